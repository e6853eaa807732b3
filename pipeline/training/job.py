"""All that a rank needs to know of a training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.training.data import TrainingImages


@dataclass(frozen=True)
class Job:
    """Picklable. `build` makes the trainable with its initial weights, the same in every process."""

    build: Callable[[], Any]
    images: TrainingImages
    seed: int
    precision: str
    work: Path  # checkpoints lie here until the run has ended well
    device: str
    ranks: int
    loaders: int  # threads that decode ahead, per rank; 0 decodes in line
