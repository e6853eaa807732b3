"""Architectural promises as tests: layers of all packages, who reads the environment, empty inits, no pickle, no print."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from pipeline.core import plugins
from pipeline.core.contracts import ExporterModule, RefinerModule
from pipeline.core.plugins import ENTRIES, available
from tests.toys import PROJECT

PLUG_INS = {"method", "dataset", "refiner", "segmenter", "exporter", "backbone", "family"}
OPEN_SETS = ("methods", "refiners", "segmenters", "datasets", "exporters")
SOURCES = sorted(path for folder in ("pipeline", "stages", "benchmarks") for path in (PROJECT / folder).rglob("*.py"))


def names_used(file: Path) -> set[str]:
    """Dotted names that a file mentions."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, (ast.Attribute, ast.Name))
    }


def test_every_init_is_empty() -> None:
    assert [path for path in SOURCES if path.name == "__init__.py" and path.read_bytes()] == []


def test_only_runtime_and_its_engines_know_the_environment() -> None:
    environment = {"os.environ", "os.getenv", "environ", "getenv"}
    readers = [path.relative_to(PROJECT).as_posix() for path in SOURCES if environment & names_used(path)]
    assert "pipeline/runtime.py" in readers
    assert all(file == "pipeline/runtime.py" or file.startswith("pipeline/engine/") for file in readers), readers


def test_members_of_open_sets_have_names_that_python_can_import() -> None:
    assert [name for kind in (*ENTRIES, "exporters") for name in available(kind) if not name.isidentifier()] == []


def test_nothing_prints() -> None:
    assert [path for path in SOURCES if "print" in names_used(path)] == []


def test_weights_are_never_unpickled() -> None:
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert "allow_pickle=True" not in text and "yaml.load(" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
    importing = [path.relative_to(PROJECT).as_posix() for path in SOURCES if "import pickle" in path.read_text("utf-8")]
    assert importing == ["pipeline/datasets/voc2012/dataset.py"]  # NumPy arrays alone


def test_no_file_asks_which_method_data_set_or_other_plug_in_it_runs() -> None:
    for path in SOURCES:
        for comparison in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Compare)):
            sides = [comparison.left, *comparison.comparators]
            names = {ast.unparse(side).split(".")[-1] for side in sides if isinstance(side, (ast.Name, ast.Attribute))}
            values = [value for side in sides for value in getattr(side, "elts", [side])]
            texts = [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
            assert not (names & PLUG_INS and texts), (path, ast.unparse(comparison))


def test_every_package_of_the_library_has_a_layer_and_does_not_know_where_it_runs() -> None:
    contracts = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    by_type = {contract["type"]: contract for contract in contracts}
    layered = {name for layer in by_type["layers"]["layers"] for name in layer.split(" | ")}
    members = {f"pipeline.{path.stem}" for path in (PROJECT / "pipeline").iterdir() if path.suffix == ".py" or path.is_dir()}
    below = members - {
        "pipeline.runtime",
        "pipeline.engine",
        "pipeline.progress",
        "pipeline.__init__",
        "pipeline.__pycache__",
    }
    assert layered == below | {"stages"}
    assert set(by_type["forbidden"]["source_modules"]) == below
    assert set(by_type["independence"]["modules"]) == {f"pipeline.{kind}.*" for kind in OPEN_SETS}


@pytest.mark.parametrize(("kind", "contract"), [("refiners", RefinerModule), ("exporters", ExporterModule)])
def test_every_refiner_and_exporter_has_the_members_that_the_contract_asks_of_its_module(kind: str, contract: type) -> None:
    assert [name for name in plugins.available(kind) if not isinstance(plugins.load(kind, name), contract)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_files_are_short_and_begin_by_saying_what_they_do(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 450
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text))
