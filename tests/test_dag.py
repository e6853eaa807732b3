"""The DAG is sound and tight: DVC's own resolution of dvc.yaml against what the code imports."""

from __future__ import annotations

import ast
import fnmatch
import re
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipeline import runtime
from pipeline.core.plugins import ENTRIES
from tests.toys import PROJECT

PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))
ALL = PROJECT / "presets" / "scenes-all.yaml"
SECTIONS = {"prepare": "prepare", "export": "export", "evaluate": "evaluate", "report": "report"}  # of params.yaml
ALSO_READ = {  # they train as stage retrain does, and segment as stage segment does
    "cross_validate": ["retrain", "segment"],
    "relabel": ["segment"],
}


def resolved(preset: Path, folder: Path) -> dict[str, Any]:
    """Stages of dvc.yaml with a preset as params.yaml, by name, as DVC resolves them."""
    from dvc.repo import Repo

    shutil.copy(PROJECT / "dvc.yaml", folder)
    shutil.copy(preset, folder / "params.yaml")
    shutil.copytree(PROJECT / "recipes", folder / "recipes")
    with Repo.init(str(folder), no_scm=True) as repo:
        return {stage.addressing.rpartition(":")[2]: stage for stage in repo.index.stages}


@pytest.fixture(scope="module", params=PRESETS, ids=lambda path: path.stem)
def stages_of_preset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return resolved(request.param, tmp_path_factory.mktemp("preset"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def stages(project: Path) -> dict[str, Any]:
    """Of presets/scenes-all.yaml: every method."""
    return resolved(ALL, project)


def deps(stage: Any) -> list[str]:
    return [dep.def_path for dep in stage.deps if dep.protocol == "local" and getattr(dep, "params", None) is None]


def params(stage: Any) -> dict[str, list[str]]:
    """File → keys that the stage declares."""
    return {dep.def_path: list(dep.params) for dep in stage.deps if getattr(dep, "params", None) is not None}


def outs(stage: Any) -> list[str]:
    return [out.def_path for out in stage.outs]


@cache
def imports(file: Path) -> set[str]:
    """Project modules that a file imports anywhere in it, functions included."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in modules if name.split(".")[0] in ("pipeline", "stages", "benchmarks")}


def closure(start: list[str]) -> set[str]:
    """Project files that the start files reach by imports, themselves included."""
    waiting, reached = list(start), set()
    while waiting:
        file = waiting.pop()
        if file in reached:
            continue
        reached.add(file)
        for name in imports(PROJECT / file):
            path = Path(*name.split(".")).with_suffix(".py")
            if (PROJECT / path).is_file():
                waiting.append(path.as_posix())
    return reached


def covered(file: str, declared: list[str]) -> bool:
    return any(file == dep or file.startswith(dep.rstrip("/") + "/") for dep in declared)


def imported(name: str, stage: Any) -> set[str]:
    """Project files that a stage can import: by its script, and by the plug-ins that its deps name."""
    starts = [f"stages/{name.split('@')[0]}.py"]
    for dep in deps(stage):
        kind = dep.split("/")[1] if dep.startswith("pipeline/") else ""
        if kind in ENTRIES and (PROJECT / dep).is_dir():
            starts.append(f"{dep}/{ENTRIES[kind]}.py")
        elif kind == "exporters":
            starts.append(dep)
    return {file for file in closure(starts) if not runtime.is_exempt(file)}


def test_every_import_of_every_stage_is_covered_by_its_deps(stages_of_preset: dict[str, Any]) -> None:
    strays = []
    for name, stage in stages_of_preset.items():
        strays += [(name, file) for file in imported(name, stage) if not covered(file, deps(stage))]
    assert strays == []


def test_every_code_dep_of_every_stage_is_imported_by_it(stages_of_preset: dict[str, Any]) -> None:
    """A folder is a closed set, or a member of an open one: something in it is imported."""
    idle = []
    for name, stage in stages_of_preset.items():
        files = imported(name, stage)
        code = [dep for dep in deps(stage) if dep.startswith(("pipeline/", "stages/"))]
        idle += [(name, dep) for dep in code if not any(covered(file, [dep]) for file in files)]
    # of methods and segmenters with SegFormer's head, of refiners that learn, of data sets with a table of tags: what has
    # none cannot say so, a slot is no condition
    some = {
        "pipeline/tag_table.py",
        "pipeline/crf.py",
        "pipeline/nn/segformer_head.py",
        "pipeline/training/settings.py",
        "pipeline/training/optim.py",
    }
    assert {dep for _, dep in idle} <= some


def test_every_path_on_a_command_line_is_a_dep_or_an_out(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        words = str(stage.cmd).replace("'", "").split()
        values = [words[at + 1] for at, word in enumerate(words) if word.startswith("--")]
        assert set(values) <= {*deps(stage), *outs(stage)}, name


def test_only_evaluate_reads_truth_after_prepare(stages: dict[str, Any]) -> None:
    assert {name.split("@")[0] for name, stage in stages.items() if "data/truth.h5" in deps(stage)} == {"evaluate"}


def test_every_exporter_is_a_dep_of_export(stages: dict[str, Any]) -> None:
    written = {f"pipeline/exporters/{path.name}" for path in (PROJECT / "pipeline" / "exporters").glob("[!_]*.py")}
    assert written and all(written <= set(deps(stage)) for name, stage in stages.items() if name.startswith("export@"))


def test_only_prepare_depends_on_the_raw_images(stages: dict[str, Any]) -> None:
    root = yaml.safe_load(ALL.read_text(encoding="utf-8"))["dataset"]["root"]
    assert [name for name, stage in stages.items() if root in deps(stage)] == ["prepare"]


def test_dvc_yaml_names_no_method() -> None:
    text = (PROJECT / "dvc.yaml").read_text(encoding="utf-8")
    methods = [path.parent.name for path in (PROJECT / "pipeline" / "methods").glob("*/method.py")]
    assert methods and not [name for name in methods if re.search(rf"\b{name}\b", text)]


def test_a_stage_resolves_its_own_deps_as_dvc_does(stages: dict[str, Any], project: Path) -> None:
    for name, stage in stages.items():
        assert sorted(runtime.declared_deps(name, project)) == sorted(deps(stage))


def test_an_import_that_is_no_dep_fails_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name, module in sys.modules.items() if str(PROJECT / "") in (getattr(module, "__file__", None) or "")]
    clean = {name: module for name, module in sys.modules.items() if name not in ours or ".venv" in str(module.__file__)}
    monkeypatch.setattr(sys, "modules", clean)
    runtime.guard("report", PROJECT)
    stray = ModuleType("pipeline.crf")
    stray.__file__ = str(PROJECT / "pipeline" / "crf.py")
    clean["pipeline.crf"] = stray
    with pytest.raises(RuntimeError, match=r"stage report imported pipeline/crf\.py"):
        runtime.guard("report", PROJECT)


def test_a_stage_depends_on_its_own_settings_only(stages: dict[str, Any]) -> None:
    runs = yaml.safe_load(ALL.read_text(encoding="utf-8"))["methods"]
    for name, stage in stages.items():
        base, _, key = name.partition("@")
        declared = params(stage)
        of_params = {param for param in declared.pop("params.yaml", []) if not param.startswith(("methods", "dataset."))}
        assert of_params == ({SECTIONS[base]} if base in SECTIONS else set()), name
        of_recipe = {} if base in SECTIONS else {runs[key]["recipe"]: sorted([base, *ALSO_READ.get(base, [])])}
        assert {file: sorted(keys) for file, keys in declared.items()} == of_recipe, name


# ---- an edit of a project file → the stages that re-run (before it is known whether their results change) ----

Rule = Callable[[str, dict[str, Any]], set[str]]
# torch, or NumPy on images
TRAINED = ("train", "extract", "fit_refiner", "refine", "cross_validate", "retrain", "segment", "relabel")


def each(*kinds: str) -> Rule:
    """These stages of every run."""
    return lambda file, runs: {
        f"{kind}@{run}" if kind not in ("prepare", "report") else kind for kind in kinds for run in runs
    }


def everything(file: str, runs: dict[str, Any]) -> set[str]:
    return each("prepare", *TRAINED, "export", "evaluate", "report")(file, runs)


def nothing(file: str, runs: dict[str, Any]) -> set[str]:
    return set()


def of_run(word: str, *kinds: str) -> Rule:
    """These stages of the runs whose `word` is the folder that the file lies in: a member of an open set."""

    def rule(file: str, runs: dict[str, Any]) -> set[str]:
        member = file.split("/")[2]
        return {f"{kind}@{run}" for run, words in runs.items() if words[word] == member for kind in kinds}

    return rule


def of_family(file: str, runs: dict[str, Any]) -> set[str]:
    """pipeline/nn/<family>: the backbone of a method and of a learned refiner, and the segmenter's encoder."""
    method = of_run("backbone", "train", "extract", "fit_refiner", "refine")(file, runs)
    return method | of_run("segmenter", "cross_validate", "retrain", "segment", "relabel")(file, runs)


def of_dataset(name: str) -> Rule:
    """The data set of scenes-all is `scenes`."""
    return lambda file, runs: {"prepare"} if name == "scenes" else set()


# the first pattern that a file matches is its row; the whole project is covered
TABLE: list[tuple[str, Rule]] = [
    ("pipeline/runtime.py", nothing),  # where work runs, never what comes out
    ("pipeline/engine/*", nothing),  # so
    ("pipeline/progress.py", nothing),
    ("pipeline/code_files.py", nothing),  # which code is installed
    ("pipeline/readers.py", nothing),
    ("pipeline/section_schema.py", nothing),
    ("pipeline/core/*", everything),
    *((f"pipeline/{name}.py", each("prepare")) for name in ("listing", "class_names", "image_files", "tag_table")),
    ("pipeline/stage_order.py", each("evaluate", "report")),
    ("pipeline/imaging/palette.py", each(*TRAINED, "export", "report")),
    ("pipeline/imaging/planes.py", each(*TRAINED, "evaluate")),
    ("pipeline/imaging/*", each(*TRAINED)),
    ("pipeline/crf.py", each("fit_refiner", "refine", "cross_validate", "segment", "relabel")),
    ("pipeline/metrics.py", each("cross_validate", "evaluate")),
    ("pipeline/metrics_file.py", each("evaluate", "report")),
    ("pipeline/mask_files.py", each("export")),
    ("pipeline/corrections.py", each("export")),
    ("pipeline/exporters/*", each("export")),
    ("pipeline/training/settings.py", each(*TRAINED)),
    ("pipeline/training/optim.py", each(*TRAINED)),
    ("pipeline/training/precision.py", each(*TRAINED)),
    ("pipeline/training/*", each("train", "extract", "fit_refiner", "cross_validate", "retrain", "segment", "relabel")),
    ("pipeline/nn/weights.py", each(*TRAINED)),
    ("pipeline/nn/torchvision_guard.py", each(*TRAINED)),
    ("pipeline/nn/segformer_head.py", each("train", "extract", "cross_validate", "retrain", "segment", "relabel")),
    ("pipeline/nn/*", of_family),
    ("pipeline/methods/*", of_run("method", "train", "extract")),  # semples' CLIP and prompts, apc's Keras ViT among them
    ("pipeline/refiners/*", of_run("refiner", "fit_refiner", "refine")),
    ("pipeline/segmenters/*", of_run("segmenter", "cross_validate", "retrain", "segment", "relabel")),
    ("pipeline/datasets/scenes/*", of_dataset("scenes")),  # its drawing, too
    ("pipeline/datasets/*", of_dataset("another")),
    ("pipeline/audit/empty_masks.py", each("export", "evaluate")),
    ("pipeline/audit/*", each("evaluate")),
    ("pipeline/report/*", each("report")),
    ("pipeline/jobs/engine.py", each("prepare", *TRAINED, "export", "evaluate")),
    ("pipeline/jobs/inspect.py", each("extract")),
    ("pipeline/jobs/score_maps.py", each("extract")),
    ("pipeline/jobs/refine.py", each("fit_refiner", "refine")),
    ("pipeline/jobs/train.py", each("train", "retrain", "cross_validate")),
    ("pipeline/jobs/training_run.py", each("train", "fit_refiner", "retrain", "cross_validate")),
    ("pipeline/jobs/segment.py", each("segment", "cross_validate", "relabel")),
    ("pipeline/jobs/windows.py", each("segment", "cross_validate", "relabel")),
    *(
        (f"pipeline/jobs/{kind}.py", each(kind))
        for kind in ("prepare", "extract", "fit_refiner", "export", "cross_validate", "relabel", "evaluate", "report")
    ),
    *((f"pipeline/jobs/{name}.py", each("prepare")) for name in ("listings", "mask_agreement", "near_duplicates", "survey")),
    ("pipeline/jobs/*", nothing),  # what the other commands do
    *((f"stages/{kind}.py", each(kind)) for kind in ("prepare", *TRAINED, "export", "evaluate", "report")),
    ("stages/*", nothing),  # the other commands
    ("benchmarks/*", nothing),
]


def project_files() -> list[str]:
    """All code: Python, and the templates of the page."""
    files = [
        path for folder in ("pipeline", "stages", "benchmarks") for path in (PROJECT / folder).rglob("*") if path.is_file()
    ]
    suffixes = {".py", ".js", ".css", ".jinja"}
    named = [
        path.relative_to(PROJECT).as_posix() for path in files if path.suffix in suffixes and path.name != "__init__.py"
    ]
    return sorted(named)


def row_of(file: str) -> tuple[str, Rule] | None:
    return next((row for row in TABLE if fnmatch.fnmatch(file, row[0])), None)


def stale_after(stages: dict[str, Any], changed: str) -> set[str]:
    """Stages that list a file among their deps."""
    return {name for name, stage in stages.items() if covered(changed, deps(stage))}


def test_an_edit_of_any_project_file_reruns_the_stages_of_its_row_and_no_other(stages: dict[str, Any]) -> None:
    runs = yaml.safe_load(ALL.read_text(encoding="utf-8"))["methods"]
    wrong = {}
    for file in project_files():
        row = row_of(file)
        expected = None if row is None else row[1](file, runs)
        if stale_after(stages, file) != expected:
            wrong[file] = (sorted(stale_after(stages, file)), expected)
    assert wrong == {}


def test_every_row_of_the_table_has_a_file() -> None:
    used = {row[0] for file in project_files() if (row := row_of(file)) is not None}
    assert [pattern for pattern, _ in TABLE if pattern not in used] == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("pipeline/methods/semples/clip.py", {"train@semples", "extract@semples"}),
        ("pipeline/methods/semples/prompts.py", {"train@semples", "extract@semples"}),
        ("pipeline/methods/apc/keras_vit.py", {"train@apc", "extract@apc"}),
        ("pipeline/datasets/scenes/drawing.py", {"prepare"}),
        ("pipeline/listing.py", {"prepare"}),
        ("pipeline/report/page.py", {"report"}),
        ("pipeline/report/web/app.js", {"report"}),
        ("recipes/photos/another.yaml", set()),
        ("pipeline/methods/another/method.py", set()),
        ("data/tags/a b.csv", {"prepare"}),
        ("data/corrections/a b.png", {f"export@{run}" for run in ("cam", "weaktr", "afa", "apc", "ppl", "semples")}),
    ],
)
def test_what_serves_few_reruns_few(stages: dict[str, Any], changed: str, expected: set[str]) -> None:
    assert stale_after(stages, changed) == expected


@pytest.mark.parametrize(
    "section", ["train", "extract", "fit_refiner", "refine", "cross_validate", "retrain", "segment", "relabel"]
)
def test_an_edit_of_a_section_of_a_recipe_marks_that_run_and_the_stages_that_read_it(
    stages: dict[str, Any], section: str
) -> None:
    marked = {name for name, stage in stages.items() if section in params(stage).get("recipes/scenes/apc.yaml", [])}
    readers = {section} | {stage for stage, sections in ALSO_READ.items() if section in sections}
    assert marked == {f"{stage}@apc" for stage in readers}
