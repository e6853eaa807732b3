"""Photographs and tags → a project folder: params.yaml filled in, recipes, an empty place for weights, under git and DVC."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipeline import code_files
from pipeline.core import sections
from pipeline.core.config import PARAMS_FILE
from pipeline.core.problems import quantity
from pipeline.core.sections import Dataset, Settings
from pipeline.jobs import forecast, project, survey
from pipeline.jobs.forecast import Forecast
from pipeline.jobs.project import DAG_FILE, ProjectError
from pipeline.jobs.survey import Survey

PRESET, RECIPES = "presets/folder.yaml", "recipes/photos"
TAGS_COPY = "data/tags/tags.csv"  # of the project: DVC sees changes of it
IGNORED = {
    ".gitignore": [
        ".work/", "__pycache__/", "/provenance/", "/report.new", "/against.html", "/dvc_plots/", "/fiftyone/",
        "/data/weights/*.safetensors", "/data/weights/*.pt", "/data/weights/*.pth", "/data/weights/*.onnx",
    ],
    ".dvcignore": [".work/", "__pycache__/"],
}  # fmt: skip
RUN_LINE = re.compile(r"^  (?:# )?(?P<name>\w+): \{method: ")


def create(folder: Path, images: Path, tags: Path | None, methods: Sequence[str]) -> Survey:
    """Makes the folder's files, and says what the data set looks like.

    ProjectError, ParamsError and DatasetError list what is wrong before anything is written.
    """
    problems = _problems(folder, images, tags, methods)
    if problems:
        raise ProjectError("\n".join(problems))
    options = _options(images, tags)
    found = _survey(images, tags, options)
    for name in ("data/corrections", "data/tags", "data/weights", "recipes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("data/corrections", "data/tags"):
        (folder / name / ".gitkeep").touch()
    for name, lines in IGNORED.items():
        _add_lines(folder / name, lines)
    for recipe in sorted((code_files.ROOT / RECIPES).glob("*.yaml")):
        text = recipe.read_text(encoding="utf-8").replace("$schema=../schema.json", "$schema=schema.json")
        (folder / "recipes" / recipe.name).write_text(text, encoding="utf-8")
    shutil.copy(code_files.ROOT / "recipes" / "schema.json", folder / "recipes")
    if tags is not None:
        shutil.copyfile(tags, folder / TAGS_COPY)
    (folder / PARAMS_FILE).write_text(params(folder, images, options, methods, found), encoding="utf-8")
    (folder / DAG_FILE).write_text(project.dag(), encoding="utf-8")
    _under_git_and_dvc(folder)
    return found


def params(folder: Path, images: Path, options: Mapping[str, Any], methods: Sequence[str], found: Survey) -> str:
    """Text of params.yaml: presets/folder.yaml with this data set's root and options, and these methods' runs."""
    lines = (code_files.ROOT / PRESET).read_text(encoding="utf-8").splitlines()
    name, classes = folder.resolve().name, quantity(len(found.classes), "class", "classes")
    images_found = f"{quantity(found.images, 'image')} ({found.train} train, {found.val} val)"
    lines[0] = f"# {name}: {images_found}, {classes}. The methods' settings are in recipes/."
    root = images.resolve()
    shown = root.relative_to(folder.resolve()).as_posix() if root.is_relative_to(folder.resolve()) else root.as_posix()
    values = {"root": shown, **options, "title": f"Pseudo-masks of {name}"}
    at = lines.index("methods:")
    end = next(number for number in range(at + 1, len(lines)) if lines[number][:1].strip())
    before = [_filled(line, values) for line in lines[:at]]
    after = [_filled(line, values) for line in lines[end:]]
    return "\n".join([*before, "methods:", *_runs(lines[at + 1 : end], methods), *after]) + "\n"


def forecasts(folder: Path, found: Survey) -> list[Forecast]:
    """How long each run of the project's params.yaml will take on this machine, and what would learn nothing."""
    size = (found.sizes.median[1], found.sizes.median[0]) if found.sizes is not None else forecast.PHOTOGRAPH
    with chdir(folder):
        runs = [Settings.read(name) for name in sections.runs(sections.read())]
        return [forecast.of(found.train, found.val, run, size=size) for run in runs]


def known_methods() -> list[str]:
    """Methods that presets/folder.yaml has a run of."""
    lines = (code_files.ROOT / PRESET).read_text(encoding="utf-8").splitlines()
    return [match["name"] for line in lines if (match := RUN_LINE.match(line))]


def initial_weights(folder: Path) -> list[str]:
    """Files of initial weights that the runs in params.yaml name and that are not there."""
    runs = yaml.safe_load((folder / PARAMS_FILE).read_text(encoding="utf-8"))["methods"].values()
    named = {run[key] for run in runs for key in run if key.endswith("init")}
    return sorted(path for path in named if not path.startswith("artifacts/") and not (folder / path).is_file())


def _problems(folder: Path, images: Path, tags: Path | None, methods: Sequence[str]) -> list[str]:
    problems = [
        f"{folder / name} is there already: choose another folder"
        for name in (PARAMS_FILE, DAG_FILE)
        if (folder / name).exists()
    ]
    if not images.is_dir():
        problems.append(f"--images {images}: no such folder")
    if tags is not None and not tags.is_file():
        problems.append(f"--tags {tags}: no such file")
    known = known_methods()
    problems += [f"--method {name}: there are {', '.join(known)}" for name in methods if name not in known]
    if "semples" in methods and "weaktr" not in methods:
        problems.append("--method semples starts from what weaktr has trained: add --method weaktr")
    return problems


def _options(images: Path, tags: Path | None) -> dict[str, Any]:
    """dataset.options: where images and tags are. A folder with images/ in it may hold tags.csv and masks/ beside it."""
    preset = yaml.safe_load((code_files.ROOT / PRESET).read_text(encoding="utf-8"))["dataset"]["options"]
    folder = "images" if (images / "images").is_dir() else "."
    return {**preset, "images": folder, "tags": None if tags is None else TAGS_COPY}


def _survey(images: Path, tags: Path | None, options: Mapping[str, Any]) -> Survey:
    """Of the data set as the project will see it: its table of tags lies in data/tags of the working directory."""
    root, table = images.resolve(), None if tags is None else tags.resolve()
    with TemporaryDirectory() as place, chdir(place):
        if table is not None:
            Path(TAGS_COPY).parent.mkdir(parents=True)
            shutil.copyfile(table, TAGS_COPY)
        return survey.of(root, Dataset("folder", str(root), options))


def _add_lines(path: Path, lines: Sequence[str]) -> None:
    """Adds lines that a file lacks; the folder may be one of git's, with a list of its own."""
    before = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    path.write_text("\n".join([*before, *(line for line in lines if line not in before)]) + "\n", encoding="utf-8")


def _filled(line: str, values: Mapping[str, Any]) -> str:
    """A line of the preset with the value of its key replaced; its comment stays."""
    match = re.match(r"^(\s*)(\w+): (.*?)(\s+#.*)?$", line)
    if match is None or match[2] not in values:
        return line
    value = yaml.safe_dump(values[match[2]], default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    return f"{match[1]}{match[2]}: {value}{match[4] or ''}"


def _runs(lines: Sequence[str], methods: Sequence[str]) -> list[str]:
    """The lines of section `methods`, with these runs active and the others as comments; recipes lie in recipes/ itself."""
    out, active = [], True
    for line in lines:
        match = RUN_LINE.match(line)
        if match:
            active = match["name"] in methods
        elif not line.startswith(("    ", "  #   ")):  # a comment between runs
            out.append(line)
            continue
        bare = re.sub(r"^  # ", "  ", line).replace(RECIPES, "recipes")
        out.append(bare if active else f"  # {bare[2:]}")
    return out


def _under_git_and_dvc(folder: Path) -> None:
    """`git init` and `dvc init`, where they were not done."""
    inside = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=folder, capture_output=True, text=True, check=False)
    if inside.returncode:
        _quietly(["git", "init", "-q"], folder)
    subdir = [] if (folder / ".git").exists() else ["--subdir"]
    if not (folder / ".dvc").is_dir():
        dvc = [sys.executable, "-m", "dvc"]
        _quietly([*dvc, "init", "-q", *subdir], folder)
        for key, value in (
            ("core.analytics", "false"),
            ("core.check_update", "false"),
            ("cache.type", "reflink,hardlink,copy"),
        ):
            _quietly([*dvc, "config", key, value], folder)


def _quietly(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProjectError(f"{' '.join(command)} in {folder}: {done.stderr.strip() or done.stdout.strip()}")
