"""params.yaml and a recipe → the settings of one run; what cannot be read is named with what there is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from pipeline.core import sections
from pipeline.core.config import ParamsError
from pipeline.core.sections import Settings
from tests.toys import Toy


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.chdir(tmp_path)
    return Toy(Path("raw"))


def test_a_run_is_read_with_its_own_recipe_and_the_sections_that_all_share(toy: Toy) -> None:
    toy.params["methods"]["cam-large"] = toy.params["methods"]["cam"] | {"recipe": "recipes/cam-large.yaml"}
    toy.recipes["cam-large"] = copy.deepcopy(toy.recipes["cam"])
    toy.recipes["cam-large"]["extract"]["scales"] = [1.0, 2.0]
    toy.write(Path())
    first, second = Settings.read("cam"), Settings.read("cam-large")
    assert (first.run.method, second.run.method, second.name) == ("cam", "cam", "cam-large")
    assert first.section(sections.Extract, "extract").scales == (1.0,)
    assert second.section(sections.Extract, "extract").scales == (1.0, 2.0)
    assert first.shared(sections.Export, "export") == second.shared(sections.Export, "export")


def test_a_run_that_params_do_not_name_is_refused_with_those_there_are(toy: Toy) -> None:
    toy.write(Path())
    with pytest.raises(ParamsError, match=r"params\.yaml: methods\.weaktr is missing \(there: cam; edit params\.yaml\)"):
        Settings.read("weaktr")


def test_a_recipe_that_is_missing_is_refused_with_those_beside_it(toy: Toy) -> None:
    toy.recipes["other"] = toy.recipes["cam"]
    toy.params["methods"]["cam"]["recipe"] = "recipes/cma.yaml"
    toy.write(Path())
    beside = r"beside it: recipes/cam\.yaml, recipes/other\.yaml"
    with pytest.raises(ParamsError, match=rf"recipe recipes/cma\.yaml is missing \({beside}\)"):
        Settings.read("cam")


@pytest.mark.parametrize("name", ["../x", "a/b", "a b", "", ".hidden", 7])
def test_a_run_whose_name_is_no_name_of_a_folder_is_refused_whichever_is_asked_for(toy: Toy, name: str) -> None:
    toy.params["methods"][name] = toy.params["methods"]["cam"]
    toy.write(Path())
    for asked in ("cam", name):
        with pytest.raises(ParamsError, match=f"methods: {name!r} cannot name a run"):
            Settings.read(asked)


@pytest.mark.parametrize("methods", [None, {}, [], "cam"])
def test_params_without_a_run_are_refused(toy: Toy, methods: object) -> None:
    toy.params["methods"] = methods
    toy.write(Path())
    with pytest.raises(ParamsError, match="methods must name at least one run"):
        Settings.read("cam")


def test_a_wrong_value_names_the_recipe_and_its_key_without_the_run(toy: Toy) -> None:
    toy.recipes["cam"]["cross_validate"]["folds"] = -1
    toy.write(Path())
    with pytest.raises(ParamsError, match=r"^recipes/cam\.yaml: cross_validate\.folds: got -1"):
        Settings.read("cam").section(sections.CrossValidate, "cross_validate")
