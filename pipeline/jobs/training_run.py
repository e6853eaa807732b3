"""A training that is ready → its run, with what a person who waits for it should know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.jobs.engine import Engine
from pipeline.training import epochs

if TYPE_CHECKING:  # fit_refiner imports this file and must not pay for torch
    from pipeline.training import loop


def follow(training: loop.Training, engine: Engine, what: str) -> None:
    """Runs a training with a bar over the steps of all its phases; says before what they come to."""
    if warning := epochs.too_few_steps(training.phases, training.images):
        engine.warn("%s: %s", what, warning)
    else:
        for phase in training.phases:
            engine.info("%s: %s: %s", what, phase.name, epochs.described(phase, training.images))
    if training.done:
        engine.info("%s: resuming at step %d of %d", what, training.done, training.steps)
    for _ in engine.progress(training.notes, training.steps, what, done=training.done, noun="steps"):
        pass
