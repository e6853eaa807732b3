"""The DAG is sound and tight: DVC's own resolution of dvc.yaml against what the code imports."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipeline import runtime
from tests.toys import PROJECT

EXEMPT = {"pipeline/runtime.py"}
OPEN_SLOTS = ("methods", "refiners", "segmenters", "datasets", "exporters")


PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    """Of params.yaml as it is."""
    from dvc.repo import Repo

    with Repo(str(PROJECT)) as repo:
        return {stage.addressing: stage for stage in repo.index.stages}


@pytest.fixture(scope="module", params=PRESETS, ids=lambda path: path.stem)
def stages_of_preset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("preset")
    shutil.copy(PROJECT / "dvc.yaml", folder)
    shutil.copy(request.param, folder / "params.yaml")
    with Repo.init(str(folder), no_scm=True) as repo:
        return {stage.addressing.rpartition(":")[2]: stage for stage in repo.index.stages}


def deps(stage: Any) -> list[str]:
    return [dep.def_path for dep in stage.deps if dep.protocol == "local" and getattr(dep, "params", None) is None]


def outs(stage: Any) -> list[str]:
    return [out.def_path for out in stage.outs]


def imports(file: Path) -> set[str]:
    """Project modules that a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.split(".")[0] in ("pipeline", "stages", "benchmarks")}


def closure(start: list[str]) -> set[str]:
    """Project files that the start files reach by imports, themselves included."""
    waiting, found = list(start), set()
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for name in imports(PROJECT / file):
            path = Path(*name.split(".")).with_suffix(".py")
            if (PROJECT / path).is_file():
                waiting.append(path.as_posix())
    return found


def covered(file: str, declared: list[str]) -> bool:
    return any(file == dep or file.startswith(dep.rstrip("/") + "/") for dep in declared)


def test_every_import_of_every_stage_is_covered_by_its_deps(stages_of_preset: dict[str, Any]) -> None:
    strays = []
    for name, stage in stages_of_preset.items():
        declared = deps(stage)
        script = f"stages/{name.split('@')[0]}.py"
        plugins = [dep for dep in declared if dep.startswith("pipeline/") and dep.endswith(".py")]
        plugins += [f"{dep}/backbone.py" for dep in declared if re.fullmatch(r"pipeline/nn/\w+", dep)]
        strays += [(name, file) for file in closure([script, *plugins]) - EXEMPT if not covered(file, declared)]
    assert strays == []


def test_every_path_on_a_command_line_is_a_dep_or_an_out(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        words = str(stage.cmd).replace("'", "").split()
        values = [words[at + 1] for at, word in enumerate(words) if word.startswith("--")]
        assert set(values) <= {*deps(stage), *outs(stage)}, name


def test_only_evaluate_reads_truth_after_prepare(stages: dict[str, Any]) -> None:
    assert {name.split("@")[0] for name, stage in stages.items() if "data/truth.h5" in deps(stage)} == {"evaluate"}


def test_every_exporter_that_writes_is_a_dep_of_export(stages: dict[str, Any]) -> None:
    files = {f"pipeline/exporters/{path.name}" for path in (PROJECT / "pipeline" / "exporters").glob("*.py")}
    written = files - {
        "pipeline/exporters/__init__.py",
        "pipeline/readers.py",
    }  # hdf5 is a reader: export writes the product
    assert all(written <= set(deps(stage)) for name, stage in stages.items() if name.startswith("export@"))


def test_only_prepare_depends_on_the_raw_images(stages: dict[str, Any]) -> None:
    root = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))["dataset"]["root"]
    assert [name for name, stage in stages.items() if root in deps(stage)] == ["prepare"]


def test_dvc_yaml_names_no_method() -> None:
    text = (PROJECT / "dvc.yaml").read_text(encoding="utf-8")
    methods = [path.stem for path in (PROJECT / "pipeline" / "methods").glob("*.py") if path.stem != "__init__"]
    assert methods and not [name for name in methods if re.search(rf"\b{name}\b", text)]


def test_the_small_stand_in_for_dvc_resolves_deps_as_dvc_does(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        assert sorted(runtime.declared_deps(name, PROJECT / "dvc.yaml", PROJECT / "params.yaml")) == sorted(deps(stage))


def test_an_import_that_is_no_dep_fails_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name, module in sys.modules.items() if str(PROJECT / "") in (getattr(module, "__file__", None) or "")]
    clean = {name: module for name, module in sys.modules.items() if name not in ours or ".venv" in str(module.__file__)}
    monkeypatch.setattr(sys, "modules", clean)
    runtime.guard("report")
    stray = ModuleType("pipeline.crf")
    stray.__file__ = str(PROJECT / "pipeline" / "crf.py")
    clean["pipeline.crf"] = stray
    with pytest.raises(RuntimeError, match=r"stage report imported pipeline/crf\.py"):
        runtime.guard("report")


def each(*names: str) -> set[str]:
    """These stages of every column of params.yaml."""
    columns = yaml.safe_load((PROJECT / "params.yaml").read_text(encoding="utf-8"))["methods"]
    return {f"{name}@{column}" for name in names for column in columns}


def stale_after(stages: dict[str, Any], changed: str) -> set[str]:
    """Stages that list a file among their deps."""
    return {name for name, stage in stages.items() if covered(changed, deps(stage))}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("pipeline/crf.py", each("fit_refiner", "refine", "cross_validate", "segment")),
        ("pipeline/metrics.py", each("cross_validate", "evaluate")),
        ("pipeline/methods/cam/method.py", {"train@cam", "extract@cam"}),
        ("pipeline/methods/weaktr/method.py", {"train@weaktr", "extract@weaktr"}),
        ("pipeline/jobs/inspect.py", each("extract")),
        ("pipeline/segmenters/vit/segmenter.py", each("cross_validate", "retrain", "segment")),
        ("pipeline/jobs/cross_validate.py", each("cross_validate")),
        ("pipeline/refiners/crf/refiner.py", each("fit_refiner", "refine")),
        ("pipeline/refiners/none/refiner.py", set()),
        ("pipeline/datasets/folder/dataset.py", set()),
        ("pipeline/nn/resnet/backbone.py", set()),
        ("pipeline/nn/mit/backbone.py", set()),
        ("pipeline/report/page.py", {"report"}),
        ("pipeline/exporters/cvat.py", each("export")),
        ("pipeline/readers.py", set()),
        ("pipeline/mask_files.py", each("export", "segment")),
        ("pipeline/jobs/segment_folder.py", each("segment")),
        ("data/corrections/a b.png", each("export")),
        ("pipeline/runtime.py", set()),
    ],
)
def test_a_file_is_a_dep_of_the_stages_that_use_it_and_of_no_other(
    stages: dict[str, Any], changed: str, expected: set[str]
) -> None:
    assert stale_after(stages, changed) == expected


ALSO_READ = {"cross_validate": ("retrain", "segment")}  # it trains as the one does and segments as the other


def test_a_stage_depends_on_its_own_params_only(stages: dict[str, Any]) -> None:
    for name, stage in stages.items():
        base, _, key = name.partition("@")
        params = [param for dep in stage.deps for param in (getattr(dep, "params", None) or [])]
        own = {f"{one}.{key}" for one in (base, *ALSO_READ.get(base, ()))} if key and base != "evaluate" else {base}
        extra = {param for param in params if not param.startswith(("methods", "dataset"))}
        assert extra == own, name
