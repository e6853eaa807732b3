"""How long a run will take: an estimate with honest bounds, from images, recipe and speed of the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.core import sections
from pipeline.core.sections import Settings
from pipeline.jobs import forecast
from tests.toys import PROJECT, Toy

RECIPES = sorted((PROJECT / "recipes").glob("*/*.yaml"))


def settings_of(recipe: str) -> Settings:
    """Of a run with a recipe of the repository."""
    params = yaml.safe_load((PROJECT / "presets" / "folder.yaml").read_text(encoding="utf-8"))
    run = sections.Run(**{**params["methods"]["apc"], "recipe": recipe})
    return Settings("mine", run, sections.dataset(params), params, sections.read_recipe(PROJECT / recipe))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_has_a_forecast_that_names_every_stage(path: Path) -> None:
    found = forecast.of(1000, 200, settings_of(path.relative_to(PROJECT).as_posix()), cores=2)
    low, high = found.seconds
    assert 0 < low < high and found.text().startswith("mine: about ") and "on 2 cores" in found.text()
    assert set(found.stages) >= {"prepare", *sections.OF_RECIPE, "export", "evaluate", "report"}


def test_more_images_take_longer_and_more_cores_less() -> None:
    cam = settings_of("recipes/photos/cam.yaml")
    some = forecast.of(1000, 200, cam, cores=2).seconds
    assert forecast.of(4000, 200, cam, cores=2).seconds[1] > 2 * some[1]
    assert forecast.of(1000, 200, cam, cores=8).seconds[1] < some[1]


def test_steps_of_a_floor_are_part_of_it() -> None:
    cam = settings_of("recipes/photos/cam.yaml")
    few = forecast.of(30, 5, cam, cores=2)
    cam.recipe["train"]["schedule"]["min_steps"] = 0
    assert few.stages["train"][1] > 5 * forecast.of(30, 5, cam, cores=2).stages["train"][1]


def test_a_training_that_would_learn_nothing_is_a_warning() -> None:
    cam = settings_of("recipes/photos/cam.yaml")
    assert forecast.of(58, 14, cam, cores=2).warnings == ()
    cam.recipe["train"]["schedule"]["min_steps"] = 0
    (warning,) = forecast.of(58, 14, cam, cores=2).warnings
    assert "train: 5 epochs × 58 images / batch 32 = 9 steps: nothing will be learned" in warning


def test_folds_of_a_cross_validation_are_part_of_it() -> None:
    toy = Toy(Path("raw"))
    without = forecast.of(100, 20, toy.settings(), cores=2).stages["cross_validate"]
    toy.recipes["cam"]["cross_validate"]["folds"] = 5
    assert forecast.of(100, 20, toy.settings(), cores=2).stages["cross_validate"][1] > without[1]


def test_it_imports_no_torch() -> None:
    text = "import sys; import pipeline.jobs.forecast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], cwd=PROJECT, check=False).returncode == 0
