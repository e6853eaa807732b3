"""Project folders: several data sets, one installation, whose code DVC sees as it does in a clone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from pipeline import code_files
from pipeline.core import sections
from pipeline.jobs import project, run
from pipeline.report import out_of_date
from stages.tag2mask import COMMANDS, main
from tests.project_copy import environment
from tests.test_dag import ALL, covered, deps, params, project_files
from tests.toys import PROJECT, Toy, toy_folder

WHEEL_SOURCES = ("pipeline/", "stages/", "presets/", "recipes/", "data/weights/scratch")
SCRIPT = """\
#!{python}
from tag2mask.stages.tag2mask import main
if __name__ == "__main__":
    main()
"""
IMPORT_ALL = """\
import importlib, pkgutil, sys
import tag2mask.pipeline.core as core, tag2mask.pipeline.jobs as jobs
from tag2mask.pipeline.core import plugins
for package in (core, jobs):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
for kind in plugins.ENTRIES:
    for name in plugins.available(kind):
        plugins.load(kind, name)
print([name for name in sys.modules if name.partition(".")[0] in ("pipeline", "stages")])
"""
NO_TORCH = """\
import sys
from pipeline.report import out_of_date
from stages.tag2mask import main
main(["--help"], standalone_mode=False)
print("torch" in sys.modules)
"""


def resolved(dag: str, folder: Path) -> dict[str, Any]:
    """Stages of a dvc.yaml by name, as DVC resolves them, with the params of scenes-all."""
    from dvc.repo import Repo

    (folder / "dvc.yaml").write_text(dag, encoding="utf-8")
    shutil.copy(ALL, folder / "params.yaml")
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    with Repo.init(str(folder), no_scm=True) as repo:
        return {stage.addressing.rpartition(":")[2]: stage for stage in repo.index.stages}


def tag2mask(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def in_project(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return resolved(project.dag(), tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def in_clone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return resolved((PROJECT / "dvc.yaml").read_text(encoding="utf-8"), tmp_path_factory.mktemp("clone"))


def test_an_edit_of_any_file_reruns_in_a_project_what_it_reruns_in_a_clone(
    in_project: dict[str, Any], in_clone: dict[str, Any]
) -> None:
    entries = {name: params(stage).get("code.yaml", []) for name, stage in in_project.items()}
    for file in project_files():
        clone = {name for name, stage in in_clone.items() if covered(file, deps(stage))}
        assert {name for name in entries if any(code_files.covers(entry, file) for entry in entries[name])} == clone, file


def test_a_project_depends_on_the_same_data_and_params_as_a_clone(
    in_project: dict[str, Any], in_clone: dict[str, Any]
) -> None:
    assert set(in_project) - {"code"} == set(in_clone)
    for name, stage in in_clone.items():
        assert deps(in_project[name]) == [dep for dep in deps(stage) if not code_files.is_code(dep)]
        assert {file: keys for file, keys in params(in_project[name]).items() if file != "code.yaml"} == params(stage)
        assert str(in_project[name].cmd) == str(stage.cmd).replace("python -m stages.", "tag2mask stage ")


def test_every_entry_that_a_stage_depends_on_is_in_code_yaml(in_project: dict[str, Any]) -> None:
    there = yaml.safe_load(project.code())
    assert {entry for stage in in_project.values() for entry in params(stage).get("code.yaml", [])} <= set(there)


@pytest.mark.parametrize("file", ["pipeline/crf.py", "pipeline/methods/apc/keras_vit.py", "pipeline/report/web/app.js"])
def test_a_changed_file_changes_the_entries_that_cover_it_and_no_other(file: str, tmp_path: Path) -> None:
    for folder in ("pipeline", "stages"):
        shutil.copytree(PROJECT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    paths = ["pipeline/crf.py", "pipeline/methods/${item.method}", "pipeline/report", "pipeline/core", "stages/train.py"]
    before = code_files.digests(paths, tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as stream:
        stream.write("\n")
    after = code_files.digests(paths, tmp_path)
    changed = {key for key in after if after[key] != before[key]}
    assert changed == {key for key in after if code_files.covers(key, file)} != set()
    assert set(code_files.changed(before, before, tmp_path)) == changed


def test_init_makes_a_project_of_the_methods_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_folder(tmp_path / "set", train=6, val=2)
    names = [word for name in ("weaktr", "semples") for word in ("--method", name)]
    out = tag2mask("init", str(tmp_path / "mine"), "--images", str(tmp_path / "set"), *names)
    assert "tag2mask weights get deit_tiny_patch16_224" in out
    monkeypatch.chdir(tmp_path / "mine")
    values = sections.read()
    assert list(values["methods"]) == ["weaktr", "semples"]
    assert values["dataset"]["root"] == (tmp_path / "set").as_posix()
    assert sections.Settings.read("semples").run.recipe == "recipes/semples.yaml"
    assert len(Path("params.yaml").read_text(encoding="utf-8").splitlines()) <= 40
    assert Path(".git").is_dir() and Path(".dvc").is_dir()
    assert not Path("pipeline").exists()


def test_init_lists_everything_that_is_wrong_and_writes_nothing(tmp_path: Path) -> None:
    wrong = ("--images", "nowhere", "--tags", "none.csv", "--method", "cammm")
    out = tag2mask("init", str(tmp_path / "mine"), *wrong, code=1)
    assert "--images nowhere" in out and "--tags none.csv" in out and "--method cammm: there are apc, " in out
    assert not (tmp_path / "mine").exists()


def test_init_in_a_folder_of_git_keeps_its_list_of_ignored_files(tmp_path: Path) -> None:
    toy_folder(tmp_path / "set", train=3, val=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".gitignore").write_text("*.secret\n.work/\n", encoding="utf-8")
    tag2mask("init", str(tmp_path / "mine"), "--images", str(tmp_path / "set"))
    lines = (tmp_path / "mine" / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["*.secret", ".work/"] and "/provenance/" in lines and lines.count(".work/") == 1


def test_init_never_writes_over_a_project(tmp_path: Path) -> None:
    toy_folder(tmp_path / "set", train=3, val=1)
    words = ("init", str(tmp_path / "mine"), "--images", str(tmp_path / "set"))
    tag2mask(*words)
    assert "is there already" in tag2mask(*words, code=1)


def test_a_dag_of_another_version_is_renewed_unless_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "dvc.yaml"
    now = project.dag()
    path.write_text(now, encoding="utf-8")
    assert not project.renew(tmp_path)
    updated = now.replace("always_changed", "always_run")
    monkeypatch.setattr(project, "dag", lambda: updated)
    assert project.renew(tmp_path) and path.read_text(encoding="utf-8") == updated
    path.write_text(now + "# mine\n", encoding="utf-8")
    with pytest.raises(project.ProjectError, match="was edited"):
        project.renew(tmp_path)
    assert path.read_text(encoding="utf-8") == now + "# mine\n"


def test_the_list_of_commands_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", NO_TORCH], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    assert "Usage: " in tag2mask(name, "--help")


def test_without_truth_a_run_shows_how_much_is_foreground_and_which_tags_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "metrics").mkdir()
    figures = {"version": 3, "coverage": {"pseudo_masks": 0.357}, "tagged_classes_without_pixels": 0.02}
    (tmp_path / "metrics" / "cam.json").write_text(json.dumps(figures), encoding="utf-8")
    assert run.figures("evaluate@cam") == "coverage 36%, 2% of tags have no pixel"


def test_a_project_whose_code_is_as_before_is_not_out_of_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = {"cmd": "echo a: 1 > code.yaml", "always_changed": True, "outs": [{"code.yaml": {"cache": False}}]}
    evaluate = {"cmd": "echo ${item} > ${item}.txt", "params": [{"code.yaml": ["a"]}, "b"], "outs": ["${item}.txt"]}
    stages = {"code": code, "evaluate": {"foreach": ["cam"], "do": evaluate}}
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}), encoding="utf-8")
    (tmp_path / "params.yaml").write_text("b: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for words in (("init", "-q", "--no-scm"), ("repro", "-q")):
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True, env=environment())
    assert out_of_date.runs(["cam"]) == set()
    (tmp_path / "params.yaml").write_text("b: 2\n", encoding="utf-8")
    assert out_of_date.runs(["cam"]) == {"cam"}


# ---- the wheel ----


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with site/, what the wheel holds, and bin/tag2mask."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in tracked:
        if (name.startswith(WHEEL_SOURCES) or "/" not in name) and (PROJECT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT / name, target)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, str(folder / "source")], check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    (folder / "bin").mkdir()
    script = folder / "bin" / "tag2mask"
    script.write_text(SCRIPT.format(python=sys.executable), encoding="utf-8")
    script.chmod(0o755)
    return folder


class Installed:
    """The console command of an installed wheel, in a folder."""

    def __init__(self, installation: Path, folder: Path) -> None:
        self.installation, self.folder, self.said = installation, folder, ""

    def __call__(self, *words: str) -> str:
        env = environment(PYTHONPATH=str(self.installation / "site"), TAG2MASK_RANKS="1", TAG2MASK_WORKERS="1")
        command = [str(self.installation / "bin" / "tag2mask"), *words]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        self.said = done.stdout
        return done.stdout

    def ran(self, *words: str) -> list[str]:
        """Stages that `tag2mask run` ran."""
        lines = self("run", *words).splitlines()
        return [line.split()[0] for line in lines if line.endswith(" …") and not line.startswith("code ")]


def test_the_wheel_holds_everything_under_one_name(installed: Path) -> None:
    names = {path.name for path in (installed / "site").iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"tag2mask"}
    env = environment(PYTHONPATH=str(installed / "site"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=installed, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stdout + done.stderr


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


def test_two_data_sets_share_an_installation_and_each_reruns_what_changed_for_it(installed: Path, tmp_path: Path) -> None:
    projects = {name: Installed(installed, tmp_path / name) for name in ("a", "b")}
    for name, command in projects.items():
        toy_folder(tmp_path / f"set_{name}", train=6, val=2)
        Installed(installed, tmp_path)("init", name, "--images", f"set_{name}", "--method", "cam")
        toy = Toy(tmp_path / f"set_{name}")
        (tmp_path / name / "recipes" / "cam.yaml").write_text(yaml.safe_dump(toy.recipes["cam"]), encoding="utf-8")
        shutil.copy(PROJECT / "data" / "weights" / "scratch.txt", tmp_path / name / "data" / "weights")
        edit(tmp_path / name / "params.yaml", "deit_tiny_patch16_224.safetensors", "scratch.txt")
        assert command.ran("--until", "prepare") == ["prepare"]
    assert projects["a"].ran("--until", "train") == ["train@cam"]
    assert re.search(r"^train@cam +\d+ s  step \d+, loss \d", projects["a"].said, re.MULTILINE)
    edit(tmp_path / "a" / "params.yaml", "on_bad_image: fail", "on_bad_image: skip")
    assert projects["b"].ran("--until", "prepare") == []
    assert projects["a"].ran("--until", "train") == ["prepare"]  # its result is the same
    with (installed / "site" / "tag2mask" / "pipeline" / "listing.py").open("a", encoding="utf-8") as code:
        code.write("\n# an update\n")
    assert "prepare: code pipeline/listing changed" in projects["b"]("status")
    assert projects["b"].ran("--until", "prepare") == ["prepare"]
