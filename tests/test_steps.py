"""How many steps a training takes, what a floor makes of them, and when they are too few to learn anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config import parse
from pipeline.training.epochs import ENOUGH_STEPS, FEWEST_STEPS, described, step_count, too_few_steps
from pipeline.training.settings import Schedule, Training
from tests.toys import PROJECT

PHASE = Schedule(5, 0, 16, 2, 1e-3, 0.0, "adamw", "poly", 0, 0.0).phase("classify")
RECIPES = sorted((PROJECT / "recipes").glob("*/*.yaml"))
# the sizes for which recipes were made: scenes of the demo, six classes of VOC 2012, VOC with SBD, COCO 2014
USUAL_IMAGES = {"scenes": 400, "photos": 1000, "voc2012": 10582, "coco2014": 82081}


@given(images=st.integers(1, 500), floor=st.integers(0, 300))
def test_a_floor_raises_steps_and_never_lowers_them(images: int, floor: int) -> None:
    without = step_count(PHASE, images)
    assert step_count(replace(PHASE, min_steps=floor), images) == max(without, floor)


def test_no_epochs_stay_no_steps_whatever_the_floor() -> None:
    assert step_count(replace(PHASE, epochs=0, min_steps=150), 58) == 0


def schedules(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a section of a recipe, of its inner phases, too."""
    found = [value for key, value in section.items() if key in ("schedule", "warm_head") and isinstance(value, dict)]
    for value in section.values():
        found += schedules(value) if isinstance(value, dict) else []
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_floor_of_a_recipe_changes_a_training_on_the_data_it_was_made_for(path: Path) -> None:
    recipe, images = yaml.safe_load(path.read_text(encoding="utf-8")), USUAL_IMAGES[path.parent.name]
    for section in ("train", "retrain"):
        for schedule in schedules(recipe[section]):
            batch = schedule.get("batch_size", recipe[section]["schedule"]["batch_size"])
            assert schedule["min_steps"] <= round(schedule["epochs"] * images / batch), (section, schedule)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_has_steps_enough_on_the_data_it_was_made_for(path: Path) -> None:
    recipe, images = yaml.safe_load(path.read_text(encoding="utf-8")), USUAL_IMAGES[path.parent.name]
    for section in ("train", "retrain"):
        schedule = parse(Training, recipe[section], section).schedule
        assert too_few_steps([schedule.phase(section)], images) is None


@pytest.mark.parametrize("path", [path for path in RECIPES if path.parent.name == "photos"], ids=lambda path: path.stem)
def test_recipes_for_photographs_have_steps_enough_on_a_few_dozen(path: Path) -> None:
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in ("train", "retrain"):
        schedule = parse(Training, recipe[section], section).schedule
        assert too_few_steps([schedule.phase(section)], 30) is None


def test_too_few_steps_are_a_warning_with_the_sum_and_the_cure() -> None:
    assert too_few_steps([PHASE], 58) == (
        "5 epochs × 58 images / batch 16 = 18 steps: nothing will be learned; take at least 150 (schedule.min_steps: 150)"
    )


def test_steps_of_all_phases_count_together() -> None:
    assert step_count(PHASE, 100) < FEWEST_STEPS < 2 * step_count(PHASE, 100)
    assert too_few_steps([PHASE], 100) is not None
    assert too_few_steps([PHASE, PHASE], 100) is None


def test_published_weights_that_are_used_as_they_are_need_no_steps() -> None:
    assert too_few_steps([replace(PHASE, epochs=0)], 58) is None


def test_a_phase_is_described_with_what_its_floor_adds() -> None:
    raised = replace(PHASE, min_steps=ENOUGH_STEPS)
    assert described(raised, 58) == "5 epochs × 58 images / batch 16 = 18 steps, raised to min_steps 150 (41 epochs)"
    assert described(PHASE, 1) == "5 epochs × 1 image / batch 16 = 1 step"
