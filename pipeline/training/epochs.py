"""How many steps a phase has, in which of them a pass over the images ends, and whether they are enough to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pipeline.core.contracts import Phase

# of all phases of a training together: fewer teach nothing, and ENOUGH_STEPS are what a first try should take
# (docs/how-many-photographs.md has the measurement)
FEWEST_STEPS = 50
ENOUGH_STEPS = 150


def step_count(phase: Phase, images: int) -> int:
    """Steps of a phase over so many training images: its epochs, rounded, at least 1 and min_steps unless epochs is 0."""
    return max(1, phase.min_steps, round(phase.epochs * images / phase.batch_size)) if phase.epochs > 0 else 0


def steps_before(phases: Sequence[Phase], number: int, images: int) -> int:
    """Steps of the first `number` phases."""
    return sum(step_count(phase, images) for phase in phases[:number])


def ends_epoch(phase: Phase, step: int, images: int) -> bool:
    """Whether a pass over the images ends in this step (from 0). The last step always counts: their number is rounded."""
    last = step + 1 == step_count(phase, images)
    return last or (step + 1) * phase.batch_size // images > step * phase.batch_size // images


def described(phase: Phase, images: int) -> str:
    """A phase's steps in words, as "5 epochs × 58 images / batch 16 = 18 steps"; with what a floor makes of them."""
    steps = step_count(phase, images)
    by_epochs = step_count(replace(phase, min_steps=0), images)
    counted = "1 image" if images == 1 else f"{images} images"
    text = f"{phase.epochs:g} epochs × {counted} / batch {phase.batch_size} = {by_epochs} step{'s' * (by_epochs != 1)}"
    if steps == by_epochs:
        return text
    return f"{text}, raised to min_steps {steps} ({steps * phase.batch_size / images:.0f} epochs)"


def too_few_steps(phases: Sequence[Phase], images: int) -> str | None:
    """A warning where a training would learn nothing, with what to do; None where it has steps enough, or none at all, as
    published weights that are used as they are."""
    steps = steps_before(phases, len(phases), images)
    if steps >= FEWEST_STEPS or all(phase.epochs == 0 for phase in phases):
        return None
    each = "; ".join(described(phase, images) for phase in phases if phase.epochs > 0)
    return f"{each}: nothing will be learned; take at least {ENOUGH_STEPS} (schedule.min_steps: {ENOUGH_STEPS})"
