"""The part of train.<m> and retrain.<m> that every trainable shares: seed, precision, augmentation, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.config import AboveZero, Count, NonNegative, Positive, Share
from pipeline.core.contracts import Phase
from pipeline.imaging.threshold import FitParams


@dataclass(frozen=True)
class RandAugment:
    """operations drawn per image; magnitude 0..10 of each, normally distributed with standard deviation spread."""

    operations: Positive
    magnitude: Annotated[float, Field(ge=0, le=10)]
    spread: NonNegative


@dataclass(frozen=True)
class Augment:
    """How a photograph becomes a square training crop.

    size        px of the crop's side
    scale_min, scale_max   the short side becomes size * uniform(scale_min, scale_max) before the crop; what falls
                short of the crop is padded and marked invalid
    area_min    null, or: the crop is a random share area_min..1 of the photograph with sides 3:4 to 4:3, stretched to the square
                (as ImageNet classifiers train); the scales are not used then
    flip        probability of a horizontal flip
    jitter      strength of brightness, contrast and saturation changes: factors uniform in 1 ± jitter
    rand_augment   null, or its settings; for tags only, since its operations move pixels and masks would not follow
    erase       probability that a random box becomes noise (tags only)
    """

    size: Positive
    scale_min: AboveZero
    scale_max: AboveZero
    area_min: Annotated[float, Field(gt=0, le=1)] | None
    flip: Share
    jitter: Annotated[float, Field(ge=0, le=0.9)]
    rand_augment: RandAugment | None
    erase: Share

    def __post_init__(self) -> None:
        if self.scale_min > self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} is above scale_max {self.scale_max}")


@dataclass(frozen=True)
class Schedule:
    """One phase's optimisation.

    epochs      passes over the images; 0 leaves the initial weights as they are (to use a published checkpoint)
    batch_size  images per step, a multiple of shards
    lr_floor    share of lr at which the schedule ends
    warmup      steps of linear rise
    """

    epochs: NonNegative
    batch_size: Positive
    shards: Positive
    lr: AboveZero
    weight_decay: NonNegative
    optimiser: Literal["adamw", "sgd"]
    schedule: Literal["poly", "linear", "cosine", "one_cycle"]
    warmup: Count
    lr_floor: Share

    def __post_init__(self) -> None:
        if self.batch_size % self.shards:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of shards {self.shards}")

    def phase(self, name: str, restart: tuple[str, ...] = (), keep_best: tuple[str, ...] = ()) -> Phase:
        return Phase(
            name=name,
            epochs=self.epochs,
            batch_size=self.batch_size,
            shards=self.shards,
            lr=self.lr,
            lr_floor=self.lr_floor,
            weight_decay=self.weight_decay,
            optimiser=self.optimiser,
            schedule=self.schedule,
            warmup=self.warmup,
            restart=restart,
            keep_best=keep_best,
        )


@dataclass(frozen=True)
class Training:
    """One section train.<m> or retrain.<m>; `model` goes to the plug-in's own Params."""

    seed: Count
    precision: Literal["fp32", "bf16", "fp16"]
    augment: Augment
    schedule: Schedule
    model: Any


@dataclass(frozen=True)
class LearnedFit(Training, FitParams):
    """The part of fit_refiner that every learned refiner shares: the threshold, and its network's training as in section train."""
