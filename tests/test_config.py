"""params.yaml is strict: what is wrong is told at once, by key, with what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.core import config, sections
from pipeline.core.config import ParamsError, parse
from tests.toys import PROJECT

PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    name: Literal["a", "b"]


@dataclass(frozen=True)
class Ball:
    shape: Literal["ball"]
    radius: Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Box:
    shape: Literal["box"]
    sides: tuple[float, float]

    def __post_init__(self) -> None:
        if self.sides[0] > self.sides[1]:
            raise ValueError(f"sides: got {list(self.sides)}, allowed is the shorter one first")


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Field(ge=1, le=9)]
    share: float
    on: bool
    inner: Inner
    several: tuple[int, ...]
    perhaps: str | None
    lists: dict[str, tuple[str, ...]]
    solid: Annotated[Ball | Box, Field(discriminator="shape")]
    mode: Literal["auto"] | Annotated[int, Field(ge=0)]
    box: Box | None
    rest: Any


GOOD: dict[str, Any] = {
    "count": 3,
    "share": 1,
    "on": True,
    "inner": {"name": "a"},
    "several": [1, 2],
    "perhaps": None,
    "lists": {"x": ["y"]},
    "solid": {"shape": "box", "sides": [1, 2.5]},
    "mode": "auto",
    "box": None,
    "rest": {1: [2]},
}


def test_a_good_section_becomes_a_dataclass() -> None:
    section = parse(Outer, GOOD, "x")
    box = Box("box", (1.0, 2.5))
    assert section == Outer(3, 1.0, True, Inner("a"), (1, 2), None, {"x": ("y",)}, box, "auto", None, {1: [2]})
    assert type(section.share) is float


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("count", 0, "x.count: got 0, allowed is a whole number >= 1 and <= 9"),
        ("count", "3", "x.count: got '3', allowed is a whole number >= 1 and <= 9"),
        ("count", 3.0, "x.count: got 3.0, allowed is a whole number >= 1 and <= 9"),
        ("count", True, "x.count: got True"),
        ("share", "much", "x.share: got 'much', allowed is a number"),
        ("share", "1", "x.share: got '1', allowed is a number"),
        ("share", False, "x.share: got False, allowed is a number"),
        ("share", float("nan"), "x.share: got nan"),
        ("share", float("inf"), "x.share: got inf"),
        ("on", 1, "x.on: got 1, allowed is true or false"),
        ("inner", 3, "x.inner: got 3, allowed is a mapping with name"),
        ("inner", {"name": "c"}, "x.inner.name: got 'c', allowed is one of a, b"),
        ("inner", {"name": "a", "nme": 1}, "x.inner.nme: unknown key, allowed are name"),
        ("inner", {"name": "a", 1: 1}, "x.inner.1: unknown key, allowed are name"),
        ("inner", {}, "x.inner.name: missing, allowed is one of a, b"),
        ("several", [1, "2"], "x.several[1]: got '2'"),
        ("several", "12", "x.several: got '12', allowed is a list of a whole number"),
        ("perhaps", 3, "x.perhaps: got 3, allowed is a text"),
        ("lists", {"a": ["b", 1]}, "x.lists.a[1]: got 1, allowed is a text"),
        ("lists", {1: ["b"]}, "x.lists: got {1: ['b']}, allowed is a mapping to a list of a text"),
        ("mode", "manual", "x.mode: got 'manual', allowed is one of auto or a whole number >= 0"),
        ("mode", -1, "x.mode: got -1, allowed is one of auto or a whole number >= 0"),
        ("box", {"shape": "box"}, "x.box.sides: missing, allowed is a list [a number, a number]"),
        ("box", {"shape": "box", "sides": [2, 1]}, "x.box: sides: got [2.0, 1.0], allowed is the shorter one first"),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_what_is_allowed(key: str, value: Any, told: str) -> None:
    with pytest.raises(ParamsError) as error:
        parse(Outer, {**GOOD, key: value}, "x")
    assert str(error.value).startswith(f"params.yaml: {told}") and str(error.value).endswith("\n(edit params.yaml)")


@pytest.mark.parametrize("sides", [[], [1], [1, 2, 3]], ids=len)
def test_a_list_of_the_wrong_length_is_told(sides: list[int]) -> None:
    with pytest.raises(ParamsError) as error:
        parse(Box, {"shape": "box", "sides": sides}, "x")
    assert (
        str(error.value) == f"params.yaml: x.sides: got {sides}, allowed is a list [a number, a number]\n(edit params.yaml)"
    )


@pytest.mark.parametrize(
    ("solid", "told"),
    [
        ({"shape": "ball", "radius": 0}, "x.solid.radius: got 0, allowed is a number > 0"),
        ({"shape": "ball", "sides": [1, 2], "radius": 1}, "x.solid.sides: unknown key, allowed are shape, radius"),
        ({"shape": "box", "sides": [2, 1]}, "x.solid: sides: got [2.0, 1.0], allowed is the shorter one first"),
        ({"shape": "cone", "radius": 1}, "x.solid.shape: got 'cone', allowed is one of ball, box"),
        ({"shape": ["ball"]}, "x.solid.shape: got ['ball'], allowed is one of ball, box"),
        ({"radius": 1}, "x.solid.shape: missing, allowed is one of ball, box"),
        ("ball", "x.solid: got 'ball', allowed is a mapping whose shape is one of ball, box"),
    ],
)
def test_of_several_variants_only_the_one_that_was_chosen_is_told(solid: Any, told: str) -> None:
    with pytest.raises(ParamsError) as error:
        parse(Outer, {**GOOD, "solid": solid}, "x")
    assert str(error.value) == f"params.yaml: {told}\n(edit params.yaml)"


@pytest.mark.parametrize("pair", [[], [0.5], [0.5, 1, 2], [2, 0.5], [0, 1]], ids=str)
def test_disagreement_needs_two_levels_in_order(pair: list[float]) -> None:
    section = {"disagree_at": [0.5, 2], "images_per_part": 8, "compression": "gzip", "options": {}}
    assert parse(sections.Refine, section, "refine.cam").disagree_at == (0.5, 2.0)
    with pytest.raises(ParamsError, match=r"disagree_at.*: got .*, allowed is "):
        parse(sections.Refine, section | {"disagree_at": pair}, "refine.cam")


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(ParamsError) as error:
        parse(Outer, {"count": 0, "share": "x", "extra": 1}, "x", Path("other.yaml"))
    lines = str(error.value).splitlines()
    for key in ("extra", *GOOD):
        assert sum(line.startswith(f"other.yaml: x.{key}: ") for line in lines) == 1
    assert lines[-1] == "(edit other.yaml)"


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=3), max_size=4))
def test_no_plain_value_gets_through_or_breaks_the_parser(values: dict[str, Any]) -> None:
    with pytest.raises(ParamsError):
        parse(Outer, values, "x")


def test_a_missing_file_and_broken_yaml_are_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="presets"):
        sections.read(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [", "utf-8")
    with pytest.raises(ParamsError, match="no valid YAML"):
        sections.read(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=r"a\.b is missing"):
        config.section({"a": {"c": 1}}, "a", "b")
