"""Architectural promises as tests: who reads the environment, empty inits, no pickle, no print."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.toys import PROJECT

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


def test_only_runtime_reads_the_environment() -> None:
    readers = [path.relative_to(PROJECT).as_posix() for path in SOURCES if {"os.environ", "os.getenv"} & names_used(path)]
    assert readers == ["pipeline/runtime.py"]


def test_nothing_prints() -> None:
    assert [path for path in SOURCES if "print" in names_used(path)] == []


def test_weights_are_never_unpickled() -> None:
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert "allow_pickle=True" not in text and "yaml.load(" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
    assert [path.name for path in SOURCES if "import pickle" in path.read_text("utf-8")] == ["voc2012.py"]


def test_no_file_knows_a_method_or_data_set_by_name() -> None:
    for path in SOURCES:
        text = path.read_text("utf-8")
        assert "if method ==" not in text and "if dataset ==" not in text, path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PROJECT).as_posix())
def test_files_are_short_and_begin_by_saying_what_they_do(path: Path) -> None:
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= 450
    assert path.name == "__init__.py" or ast.get_docstring(ast.parse(text))
