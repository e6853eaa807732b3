"""params.yaml is strict: what is wrong is told at once, by key, with what is allowed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core import config, sections
from pipeline.core.config import ParamsError, Range, parse
from stages import check
from tests.toys import PROJECT

PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))


@dataclass(frozen=True)
class Inner:
    name: Literal["a", "b"]


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(low=1, high=9)]
    share: float
    on: bool
    inner: Inner
    several: tuple[int, ...]
    perhaps: str | None


GOOD: dict[str, Any] = {"count": 3, "share": 1, "on": True, "inner": {"name": "a"}, "several": [1, 2], "perhaps": None}


def test_a_good_section_becomes_a_dataclass() -> None:
    assert parse(Outer, GOOD, "x") == Outer(3, 1.0, True, Inner("a"), (1, 2), None)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("count", 0, "x.count: got 0, allowed is a whole number >= 1 and <= 9"),
        ("count", "3", "x.count: got '3', allowed is a whole number >= 1 and <= 9"),
        ("count", True, "x.count: got True"),
        ("share", "much", "x.share: got 'much', allowed is a number"),
        ("share", float("nan"), "x.share: got nan"),
        ("on", 1, "x.on: got 1, allowed is true or false"),
        ("inner", {"name": "c"}, "x.inner.name: got 'c', allowed is one of a, b"),
        ("inner", {"name": "a", "nme": 1}, "x.inner.nme: unknown key, allowed are name"),
        ("several", [1, "2"], "x.several[1]: got '2'"),
        ("perhaps", 3, "x.perhaps: got 3"),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_what_is_allowed(key: str, value: Any, told: str) -> None:
    with pytest.raises(ParamsError) as error:
        parse(Outer, {**GOOD, key: value}, "x")
    assert told in str(error.value) and "params.yaml" in str(error.value)


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(ParamsError) as error:
        parse(Outer, {"count": 0, "share": "x", "extra": 1}, "x")
    for key in ("count", "share", "extra", "on", "inner", "several", "perhaps"):
        assert f"x.{key}" in str(error.value)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=3), max_size=4))
def test_no_plain_value_gets_through_or_breaks_the_parser(values: dict[str, Any]) -> None:
    with pytest.raises(ParamsError):
        parse(Outer, values, "x")


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_is_well(preset: Path) -> None:
    assert check.problems(preset) == []


def test_params_yaml_starts_as_a_copy_of_the_scenes_preset() -> None:
    assert (PROJECT / "params.yaml").read_text("utf-8") == (PROJECT / "presets" / "scenes.yaml").read_text("utf-8")


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(values, dict) and values:
        return [leaf for key, inner in values.items() for leaf in leaves(inner, (*path, key))]
    return [path]


SCENES = yaml.safe_load((PROJECT / "presets" / "scenes-all.yaml").read_text("utf-8"))
REPORTED = [
    leaf
    for leaf in leaves(SCENES)
    if leaf[-1] not in ("options", "disagree_at", "crf", "clipping", "long_side", "short_side", "energy")
]


@pytest.mark.parametrize("leaf", REPORTED, ids=".".join)
def test_any_key_that_is_missing_or_misspelt_is_found_before_work(leaf: tuple[str, ...], tmp_path: Path) -> None:
    values = copy.deepcopy(SCENES)
    section = values
    for key in leaf[:-1]:
        section = section[key]
    section[leaf[-1] + "x"] = section.pop(leaf[-1])
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    assert check.problems(path)


def test_a_walk_without_an_affinity_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    values = copy.deepcopy(SCENES)
    values["methods"]["afa"]["refiner"] = "walk"
    values["refine"]["afa"]["options"] |= {"radius": 2, "power": 2.0, "eps": 0.1}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    assert check.problems(path) == [
        "extract.afa.keep_affinity: got false, allowed is true, since refiner walk needs it (edit params.yaml)"
    ]


def test_a_section_for_a_column_that_is_not_there_is_told(tmp_path: Path) -> None:
    values = copy.deepcopy(SCENES)
    values["train"]["nobody"] = {}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(values), "utf-8")
    assert any("train has nobody" in problem for problem in check.problems(path))


def test_a_missing_file_and_broken_yaml_are_told(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="presets"):
        sections.read(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [", "utf-8")
    with pytest.raises(ParamsError, match="no valid YAML"):
        sections.read(tmp_path / "params.yaml")
    with pytest.raises(ParamsError, match=r"a\.b is missing"):
        config.section({"a": {"c": 1}}, "a", "b")
