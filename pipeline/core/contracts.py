"""The waist: what every method, refiner, segmenter, data set and exporter must fill. Nothing here runs.

Shape letters: b images, c classes of the data set, k classes present in one image, h w pixels of an image,
gh gw cells of a score-map grid, n = gh * gw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pipeline.core.labels import LabelSpace
from pipeline.core.records import Records

if TYPE_CHECKING:  # stages without model work import this file and must not pay for torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One (sub-)batch of training images, after augmentation.

    images  f32[b,3,h,w] RGB in 0..1; the network normalises, so that callers cannot disagree
    tags    f32[b,c] 0 or 1
    valid   bool[b,h,w] False on padding
    masks   u8[b,h,w] mask values (IGNORE on padding), or None where only tags train
    """

    images: Tensor
    tags: Tensor
    valid: Tensor
    masks: Tensor | None


@dataclass(frozen=True)
class Clock:
    """Where a training run stands: `step` of `steps` in phase number `phase`, both from 0."""

    phase: int
    step: int
    steps: int

    def reached(self, iters: float) -> bool:
        """Whether a warm-up of so many steps, or below 1 of such a share of all steps, is over."""
        return self.step >= (iters if iters >= 1 else iters * self.steps)


@dataclass(frozen=True)
class Phase:
    """One stretch of training with its own optimiser.

    epochs      passes over the training images; the loop makes round(epochs * n / batch_size) steps of them, at least one
                unless epochs is 0
    batch_size  images per step
    shards      equal sub-batches of one step, each computed by itself and summed in order. It changes the
                floating-point result, so it is a param; how many processes share the shards is not.
    lr          peak learning rate; falls by `schedule` to lr * lr_floor after `warmup` steps of linear rise
    restart     prefixes of state-dict names that go back to their initial weights as the phase starts; the rest carries over
    keep_best   prefixes of state-dict names that end the phase as they were after the epoch of the highest `score`, the earliest
                such one (Trainable); (): as the last step left them. An epoch that ends within a step counts from that step on
    """

    name: str
    epochs: float
    batch_size: int
    shards: int
    lr: float
    weight_decay: float
    optimiser: str  # "adamw" | "sgd"
    schedule: str  # "poly" | "linear" | "cosine" | "one_cycle"
    warmup: int
    lr_floor: float = 0.0
    restart: tuple[str, ...] = ()
    keep_best: tuple[str, ...] = ()


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning-rate factor: lr = phase.lr * lr_factor."""

    parameters: Sequence[Tensor]
    lr_factor: float
    weight_decay_factor: float


@dataclass(frozen=True)
class ScoreMaps:
    """What a method says about a batch of equally sized views (tensors) or about one image (arrays, b dropped).

    scores      f32[b,c,gh,gw] evidence >= 0 per class; no background plane
    affinity    f32[b,n,n] symmetric, of the cells of the network's stride, or None
    tag_logits  f32[b,c] the network's own image-level opinion, before the sigmoid
    decoded     f32[b,c+1,·,·] probabilities of the method's own decoder, plane 0 background; None where it has none
    """

    scores: Tensor
    affinity: Tensor | None
    tag_logits: Tensor
    decoded: Tensor | None = None


@dataclass(frozen=True)
class Surroundings:
    """What a method that suppresses what surrounds its classes says about p pairs of an image and a class that it is tagged with.

    match    f32[p,c] cosine of the image without the class, and what is suppressed beside each class; f32[p,0] where nothing is
             suppressed, and then nobody need ask again
    outside  f32[p,s,s] in 0..1 how much is left of the image where the class is taken out; the image stretched to the square
    told     what is suppressed, in words for the report
    """

    match: Tensor
    outside: Tensor
    told: str


@dataclass(frozen=True)
class ImageMaps:
    """Score maps of one image as refiners and evaluate read them.

    classes  i64[k] 0-based class positions, ascending; scores f32[k,gh,gw] in 0..1; size (h, w) px of the image
    affinity f32[n,n] of all pairs of cells of `grid` (rows, columns), or None where the method kept none
    id       of the image, for refiners that know more of it than its maps; "" where nobody asks
    """

    classes: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    affinity: np.ndarray | None = None
    grid: tuple[int, int] = (0, 0)
    id: str = ""


class Trainable(Protocol):
    """A torch module that the one training loop can train. One with a phase that has keep_best also has

    score(batch: Batch) -> Tensor
        f32[2], how good the weights are, told without masks: a sum over whatever the batch has, and of how many. The loop asks after
        each epoch, in eval mode and without gradient, for the same training images each time, and divides the sums.
    """

    def load_initial(self, family: Any, init: Path) -> None:
        """Weights to start from, a file; family is the column's module of pipeline/nn. ValueError if they do not fit."""
        ...

    def phases(self) -> list[Phase]: ...

    def param_groups(self, phase: Phase) -> list[ParamGroup]: ...

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Weighted scalars by name; the loop minimises their sum. Each is a mean over the sub-batch."""
        ...


class Method(Trainable, Protocol):
    """Module-level names of pipeline/methods/<name>.py: Params, Options (frozen dataclasses) and Method.

    A method that suppresses what surrounds its classes may also have

    surroundings(images: Tensor, pairs: Tensor) -> Surroundings
        of unmasked views f32[b,3,h,w] and pairs i64[p,2] of image in the batch and class, p >= 1. extract then looks once through the
        train images, and the report shows, per class, those that match what is suppressed best.
    """

    def __init__(self, labels: LabelSpace, params: Any, family: Any) -> None: ...

    def score_maps(self, images: Tensor, options: Any, *, keep_affinity: bool = False) -> ScoreMaps:
        """The affinity is only asked for where it is kept."""
        ...

    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Inner tensors by name. The report draws those of shape f32[b,c,gh,gw] as maps of each image's first class, and
        f32[b,layers,heads] under a name that ends in `_weights` as a table."""
        ...


class Segmenter(Trainable, Protocol):
    """Module-level names of pipeline/segmenters/<name>.py: Params, Options (frozen dataclasses) and Segmenter."""

    def segment(self, images: Tensor, options: Any) -> Tensor:
        """f32[b,3,h,w] in 0..1 → f32[b,c+1,h,w] logits, plane 0 background."""
        ...


class Refiner(Protocol):
    """Module-level names of pipeline/refiners/<name>.py: FitParams, Params (frozen dataclasses), Refiner, NEEDS_AFFINITY = True
    where it reads maps.affinity, and

    fit(params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]
        sees every train image once (no ground truth), images(i) being the photograph u8[h,w,3] of the i-th of `maps`;
        the state has at least `background` f32[1] > 0, the fitted background level.

    check(params: FitParams), where there is something to check: ValueError, before anything is trained, if what the params name
        outside the project is missing or not what they say.

    A refiner that is learned also has a Trainable Network(params.model, params.schedule, family), whose FitParams are background,
    seed, precision, augment, schedule, model and its own; and

    training_labels(params: FitParams, image, maps, level) -> u8[h,w] mask values
        what the network learns of one train image; 255 where it is not sure.

    Its Refiner is given the trained network as a third argument.
    """

    def __init__(self, params: Any, state: Mapping[str, np.ndarray]) -> None: ...

    def __call__(self, image: np.ndarray, maps: ImageMaps, level: float) -> np.ndarray:
        """u8[h,w,3] and k >= 1 score maps → f32[k+1,h,w] probabilities, plane 0 background, at background `level`."""
        ...


@dataclass(frozen=True)
class Listing:
    """One image as a data set lists it, before prepare has opened anything.

    path, mask_path are relative to dataset.root; tags are class names, or None where nobody tagged the image.
    """

    id: str
    path: Path
    split: str  # "train" | "val"
    tags: tuple[str, ...] | None
    mask: bool


class Dataset(Protocol):
    """Module-level names of pipeline/datasets/<name>.py: Params and Dataset(root, params)."""

    labels: LabelSpace

    def listings(self) -> list[Listing]:
        """Every image, in any order. Raises DatasetError listing all that is wrong with lists and tags; the error's own
        `listings`, each id once, are what could be listed all the same."""
        ...

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values. Only called where listing.mask is True."""
        ...


class Exporter(Protocol):
    """Module-level name of pipeline/exporters/<name>.py: write(masks, records, out). A module may also have check(), which
    raises ValueError where something that it needs is missing; `stages.check` and export ask it before any work."""

    def __call__(self, masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
        """Streams (id, u8[h,w] mask values) in id order into folder `out`, which it makes where it is missing."""
        ...
