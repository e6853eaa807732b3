"""How many steps a phase has, and in which of them a pass over the images ends."""

from __future__ import annotations

from pipeline.core.contracts import Phase


def step_count(phase: Phase, images: int) -> int:
    """Steps of a phase over so many training images: its epochs, rounded, at least one step unless epochs is 0."""
    return max(1, round(phase.epochs * images / phase.batch_size)) if phase.epochs > 0 else 0


def ends_epoch(phase: Phase, step: int, images: int) -> bool:
    """Whether a pass over the images ends in this step (from 0). The last step always counts: their number is rounded."""
    last = step + 1 == step_count(phase, images)
    return last or (step + 1) * phase.batch_size // images > step * phase.batch_size // images
