"""params.yaml, presets and recipes: short, strict, each checked through the code that runs them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from pipeline.core import plugins
from pipeline.core.config import ParamsError
from pipeline.core.sections import Settings
from pipeline.jobs import check, schema
from tests.toys import PROJECT, Toy

PRESETS = sorted((PROJECT / "presets").glob("*.yaml"))
RECIPES = sorted((PROJECT / "recipes").glob("*/*.yaml"))
METHODS = plugins.available("methods")
# what a recipe says there is checked where it is used: null, or options of one's own
NULLABLE = ("options", "disagree_at", "crf", "clipping", "long_side", "short_side", "energy")


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)  # recipes are named from there


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.name)
def test_every_preset_and_the_recipes_that_it_names_are_well(preset: Path) -> None:
    assert check.problems(preset) == []


def test_params_yaml_starts_as_a_copy_of_the_scenes_preset() -> None:
    fresh = Path("params.yaml").read_text("utf-8") == Path("presets/scenes.yaml").read_text("utf-8")
    assert fresh, "params.yaml is yours; before `make test`, `cp presets/scenes.yaml params.yaml`"


def test_params_and_presets_fit_a_screen_and_recipes_two() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in (Path("params.yaml"), *PRESETS, *RECIPES)}
    assert [path for path, count in lines.items() if count > (110 if path in RECIPES else 40)] == []
    assert not [path for path in lines for line in path.read_text("utf-8").splitlines() if len(line) > 125]


def test_every_method_has_a_recipe_for_scenes_which_the_tests_cut_down_to_toys() -> None:
    assert {path.stem for path in RECIPES if path.parent.name == "scenes"} == set(METHODS)


def test_the_preset_for_photographs_runs_one_method() -> None:
    assert list(yaml.safe_load(Path("presets/folder.yaml").read_text("utf-8"))["methods"]) == ["apc"]


def test_the_methods_that_are_commented_out_in_the_folder_preset_are_well(tmp_path: Path) -> None:
    text = Path("presets/folder.yaml").read_text("utf-8")
    lines = [line.replace("  # ", "  ", 1) if ": {" in line or "  #   init" in line else line for line in text.splitlines()]
    path = tmp_path / "params.yaml"
    path.write_text("\n".join(lines), "utf-8")
    assert len(yaml.safe_load(path.read_text("utf-8"))["methods"]) > 1
    assert check.problems(path) == []


def test_the_schema_for_editors_is_fresh_and_every_recipe_names_it() -> None:
    assert Path(schema.SCHEMA).read_text("utf-8") == schema.text(), "run `python -m stages.schema`"
    assert [
        path for path in RECIPES if "# yaml-language-server: $schema=../schema.json" not in path.read_text("utf-8")
    ] == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_editor_finds_every_recipe_valid_and_a_misspelt_key_wrong(recipe: Path) -> None:
    validator = Draft202012Validator(json.loads(Path(schema.SCHEMA).read_text("utf-8")))
    values = yaml.safe_load(recipe.read_text("utf-8"))
    assert [error.message for error in validator.iter_errors(values)] == []
    for section in values:
        wrong = {**values, section: {**values[section], "wrong": 1}}
        assert not validator.is_valid(wrong), section


def leaves(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(values, dict) and values:
        return [leaf for key, inner in values.items() for leaf in leaves(inner, (*path, key))]
    return [path]


def misspelt(values: dict[str, Any], leaf: tuple[str, ...]) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    section = changed
    for key in leaf[:-1]:
        section = section[key]
    section[leaf[-1] + "x"] = section.pop(leaf[-1])
    return changed


@pytest.mark.parametrize("method", METHODS)
def test_any_key_of_a_recipe_that_is_missing_or_misspelt_is_found_before_work(method: str) -> None:
    toy = Toy(Path("raw"), [method])
    toy.recipes[method] = yaml.safe_load(Path(f"recipes/scenes/{method}.yaml").read_text("utf-8"))
    assert check.problems_of(toy.settings(method)) == []
    passed = []
    for leaf in leaves(toy.recipes[method]):
        if leaf[-1] in NULLABLE:
            continue
        settings = toy.settings(method)
        wrong = Settings(method, settings.run, settings.dataset, settings.params, misspelt(toy.recipes[method], leaf))
        try:
            problems = check.problems_of(wrong)
        except ParamsError as error:
            problems = [str(error)]
        if not any(leaf[-1] in problem for problem in problems):
            passed.append(leaf)
    assert passed == []


@pytest.mark.parametrize(
    "leaf", [leaf for leaf in leaves(Toy(Path("raw")).params) if leaf[-1] not in NULLABLE], ids=".".join
)
def test_any_key_of_params_that_is_missing_or_misspelt_is_found_before_work(leaf: tuple[str, ...], tmp_path: Path) -> None:
    toy = Toy(Path("raw"))
    toy.params["methods"]["cam"]["recipe"] = "recipes/scenes/cam.yaml"
    toy.params = misspelt(toy.params, leaf)
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(toy.params), "utf-8")
    assert check.problems(path)


def test_a_wrong_value_names_the_recipe_its_key_and_what_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(Path("raw"))
    toy.recipes["cam"]["extract"]["stride"] = 0
    toy.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    (problem,) = check.problems()
    assert problem.startswith("recipes/cam.yaml: extract.stride: got 0, allowed is a whole number >= 1 and <= 32")
    assert problem.endswith("(edit recipes/cam.yaml)")


def test_a_walk_without_an_affinity_is_named_before_anything_is_trained() -> None:
    toy = Toy(Path("raw"), ["afa"])
    toy.params["methods"]["afa"]["refiner"] = "walk"
    toy.recipes["afa"]["refine"]["options"] |= {"radius": 2, "power": 2.0, "eps": 0.1}
    assert check.problems_of(toy.settings("afa")) == [
        "recipes/afa.yaml: extract.keep_affinity: got false, allowed is true, since refiner walk needs it (edit "
        "recipes/afa.yaml)"
    ]


def test_an_affinity_that_the_method_does_not_have_is_named_before_anything_is_trained() -> None:
    toy = Toy(Path("raw"))
    toy.recipes["cam"]["extract"]["keep_affinity"] = True
    (problem,) = check.problems_of(toy.settings())
    assert "extract.keep_affinity: got true, allowed is false, since method cam has no affinity" in problem


def test_an_unknown_and_a_missing_section_of_a_recipe_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(Path("raw"))
    toy.recipes["cam"]["refien"] = toy.recipes["cam"].pop("refine")
    toy.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    (problem,) = check.problems()
    assert (
        "unknown section 'refien'" in problem and "section 'refine' is missing" in problem and "recipes/cam.yaml" in problem
    )
