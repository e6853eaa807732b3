"""The JSON schema of a section says what its dataclass says: types, bounds, keys, and the docstring's words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from pipeline.core import plugins, sections
from pipeline.core.config import AboveZero, Positive, Share
from pipeline.section_schema import docstring_parts, json_schema
from pipeline.training.settings import Training

SETS = ("methods", "refiners", "segmenters", "datasets")
PLUGINS = [(kind, name) for kind in SETS for name in plugins.available(kind)]
SECTIONS = (
    sections.Dataset, sections.Run, sections.Prepare, Training, sections.Extract, sections.Refine, sections.Export,
    sections.CrossValidate, sections.Segment, sections.Evaluate, sections.Report,
)  # fmt: skip


@dataclass(frozen=True)
class Ball:
    """A round one."""

    shape: Literal["ball"]
    radius: AboveZero


@dataclass(frozen=True)
class Box:
    shape: Literal["box"]
    sides: tuple[float, float]


@dataclass(frozen=True)
class Base:
    """What all have.

    count   how many there are,
            and that is
            all
    on, off   switches
    """

    count: Positive
    on: bool
    off: bool


@dataclass(frozen=True)
class Whole(Base):
    """on      the main switch
    several  a list:
        first  not a field of its own, though `off` is one
        off  nor is this
    nobody  has no such field

    After an empty line:
    this is about the class.
    """

    several: tuple[Annotated[int, Field(ge=2, le=8)], ...]
    names: dict[str, Share]
    ball: Ball | None
    solid: Annotated[Ball | Box, Field(discriminator="shape")]
    options: Any


BALL = {
    "title": "Ball",
    "description": "A round one.",
    "type": "object",
    "properties": {"shape": {"const": "ball", "type": "string"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["shape", "radius"],
    "additionalProperties": False,
}
PAIR = {"type": "array", "prefixItems": [{"type": "number"}, {"type": "number"}], "minItems": 2, "maxItems": 2}
BOX = {
    "title": "Box",
    "type": "object",
    "properties": {"shape": {"const": "box", "type": "string"}, "sides": PAIR},
    "required": ["shape", "sides"],
    "additionalProperties": False,
}


def test_a_schema_holds_types_bounds_keys_and_descriptions_and_stands_alone() -> None:
    several = "a list: first not a field of its own, though `off` is one off nor is this nobody has no such field"
    properties = {
        "count": {"type": "integer", "minimum": 1, "description": "how many there are, and that is all"},
        "on": {"type": "boolean", "description": "the main switch"},
        "off": {"type": "boolean", "description": "switches"},
        "several": {"type": "array", "items": {"type": "integer", "minimum": 2, "maximum": 8}, "description": several},
        "names": {"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": 1}},
        "ball": {"anyOf": [BALL, {"type": "null"}]},
        "solid": {"oneOf": [BALL, BOX], "discriminator": {"propertyName": "shape"}},
        "options": {},
    }
    assert json_schema(Whole) == {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Whole",
        "description": "After an empty line: this is about the class.",
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def test_a_class_without_a_docstring_has_no_description() -> None:
    assert docstring_parts(Box) == ("", {})


def test_a_docstring_of_one_line_may_be_a_field() -> None:
    @dataclass(frozen=True)
    class Line:
        """length  px, of the whole line"""

        length: Positive

    assert docstring_parts(Line) == ("", {"length": "px, of the whole line"})


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """All parts of a schema that describe a mapping with fixed keys."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ()
    if isinstance(schema, dict) and isinstance(schema.get("properties"), dict):
        yield schema
    for part in parts:
        yield from objects(part)


def kinds(plugin: Any) -> list[type[Any]]:
    return [getattr(plugin, name) for name in ("Params", "Options", "FitParams") if hasattr(plugin, name)]


@pytest.mark.parametrize(("kind", "name"), PLUGINS, ids="-".join)
def test_every_plugin_has_strict_schemas(kind: str, name: str) -> None:
    for settings in kinds(plugins.load(kind, name)):
        for part in objects(json_schema(settings)):
            assert part["additionalProperties"] is False and part.get("required", []) == list(part["properties"])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_has_a_strict_schema(section: type[Any]) -> None:
    for part in objects(json_schema(section)):
        assert part["additionalProperties"] is False and part["required"] == list(part["properties"])
