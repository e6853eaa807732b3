"""The part of the sections train and retrain that every trainable shares: seed, precision, augmentation, schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.config import AboveZero, Count, NonNegative, Positive, Precision, Share
from pipeline.core.contracts import Phase
from pipeline.imaging.threshold import FitParams


@dataclass(frozen=True)
class RandAugment:
    """operations  drawn per image
    magnitude   mean of the operations' magnitudes, 0..10
    spread      their standard deviation
    """

    operations: Positive
    magnitude: Annotated[float, Field(ge=0, le=10)]
    spread: NonNegative


@dataclass(frozen=True)
class Augment:
    """Photograph → square training crop.

    size          px, side of the crop
    scale_min     the short side becomes size * uniform(scale_min, scale_max) px before the crop; where that is smaller than
                  the crop, it is padded and the padding marked invalid
    scale_max     upper end of that range
    area_min      null, or the least fraction of the photograph's area: a random box of area_min..1 of it with sides 3:4 to
                  4:3 is stretched to the square (Szegedy et al. 2015), and the scales are not used
    flip          probability of a horizontal flip
    jitter        factors of brightness, contrast and saturation are uniform in 1 ± jitter
    rand_augment  null, or settings of RandAugment; only where no masks are trained on: its operations move pixels, masks
                  would not follow
    erase         probability that a random box becomes noise; only where no masks are trained on
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
    """Optimisation of a phase.

    epochs        passes over the images; 0 leaves the initial weights as they are (to use a published checkpoint)
    min_steps     a floor: with so few images that the epochs make fewer steps, so many are made (more passes); 0: none
    batch_size    images per step, a multiple of shards
    shards        equal sub-batches whose gradients are summed in a step; a setting of the numerics, whatever the number of
                  processes
    lr            peak learning rate
    weight_decay  of matrices and kernels; biases and norms are not decayed
    optimiser     adamw, or sgd with Nesterov momentum 0.9
    schedule      course of the learning rate after warm-up
    warmup        steps of linear rise
    lr_floor      fraction of lr at which the schedule ends
    """

    epochs: NonNegative
    min_steps: Count
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
            min_steps=self.min_steps,
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
    """Section train or retrain.

    seed       of weights, order and augmentation
    precision  of the network: fp32; tf32, which is fp32 with products of 10 bits on an NVIDIA GPU (as fp32 on a CPU); bf16
               and fp16 where the processor is fast at them
    augment    photograph → square training crop
    schedule   optimisation
    model      of the method (train) or of the segmenter (retrain)
    """

    seed: Count
    precision: Precision
    augment: Augment
    schedule: Schedule
    model: Any


@dataclass(frozen=True)
class LearnedFit(Training, FitParams):
    """The part of section fit_refiner that every learned refiner shares: the threshold and its network's training."""
