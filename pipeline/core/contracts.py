"""The contract: what every method, refiner, segmenter, data set and exporter must provide, and what they exchange.

Optional members are protocols of their own, which the jobs ask for with isinstance: of objects Scored,
WithSurroundings and DatasetWithWarnings; of plug-in modules LearnedRefiner, CheckedRefiner, AffinityRefiner and
CheckedExporter.

Shape letters: b images of a batch, c classes of the data set, k classes present in one image, h w pixels of an image,
gh gw cells of a score-map grid, n = gh * gw, p pairs of an image and a class. Masks hold 0 background, i + 1 class i,
255 ignore (core/labels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

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
    source  the same batch on the CPU, which this one was copied from
    """

    images: Tensor
    tags: Tensor
    valid: Tensor
    masks: Tensor | None
    source: Batch | None = None

    @property
    def on_host(self) -> Batch:
        """What the host may read without waiting for the device: source, or this batch if it was made on its device."""
        return self.source or self

    def to(self, device: str) -> Batch:
        """Copied to the device, while the host goes on."""
        return Batch(
            images=self.images.to(device, non_blocking=True),
            tags=self.tags.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            masks=None if self.masks is None else self.masks.to(device, non_blocking=True),
            source=self,
        )

    def tagged(self) -> Tensor:
        """i64[p,2], image and class (0-based) of every tag, on the host."""
        return self.on_host.tags.nonzero().cpu()


@dataclass(frozen=True)
class Clock:
    """Position in a training run: phase number and optimiser step within that phase, both from 0; steps of that phase."""

    phase: int
    step: int
    steps: int

    def reached(self, iters: float) -> bool:
        """Whether a warm-up is over. iters: its length in steps if at least 1, else as a fraction of the phase's steps."""
        return self.step >= (iters if iters >= 1 else iters * self.steps)


@dataclass(frozen=True)
class Phase:
    """A part of training with an optimiser and a learning-rate schedule of its own.

    name          for logs and plots
    epochs        passes over the training images; the loop makes round(epochs * images / batch_size) steps, at least 1 and
                  at least min_steps unless epochs is 0
    batch_size    images per step
    shards        equal sub-batches of one step, computed separately and summed in order. It changes the floating-point
                  result, so it is a param; how many processes share the shards does not, and is none
    lr            peak learning rate, reached after `warmup` steps of linear rise; falls by `schedule` to lr * lr_floor
    weight_decay  of the optimiser, before a group's weight_decay_factor
    warmup        steps
    restart       prefixes of state-dict names that are reset to their initial weights as the phase starts
    keep_best     prefixes of state-dict names whose weights at the end of the phase are those of the epoch with the
                  highest Scored.score, the earliest of equals; (): those of the last step. An epoch that ends within a
                  step ends with that step
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
    min_steps: int = 0


@dataclass(frozen=True)
class ParamGroup:
    """Parameters trained at lr = phase.lr * lr_factor and weight decay = phase.weight_decay * weight_decay_factor."""

    parameters: Sequence[Tensor]
    lr_factor: float
    weight_decay_factor: float


@dataclass(frozen=True)
class ScoreMaps:
    """A method's output for a batch of images of equal size.

    scores      f32[b,c,gh,gw] evidence >= 0 per class; no background plane
    affinity    f32[b,n,n] symmetric, between the cells of a grid at the network's stride (Method.stride), or None
    tag_logits  f32[b,c] image-level classification logits, before the sigmoid
    decoded     f32[b,c+1,dh,dw] probabilities of the method's segmentation decoder, at its own resolution, plane 0
                background; None where it has no decoder
    """

    scores: Tensor
    affinity: Tensor | None
    tag_logits: Tensor
    decoded: Tensor | None = None


@dataclass(frozen=True)
class Surroundings:
    """What a method suppresses beside p classes in their images, and how well it matches the images without the class.

    match        f32[p,c] cosine between the image with the pair's class masked out, and what is suppressed beside each
                 class of the data set; f32[p,0] where nothing is suppressed, whatever the images
    outside      f32[p,s,s] in 0..1, the mask that takes the class out (1: pixel kept), over the image resized to s × s px
    description  what is suppressed, in words for the report
    """

    match: Tensor
    outside: Tensor
    description: str


@dataclass(frozen=True)
class ImageMaps:
    """Score maps of one image, as refiners and evaluate read them.

    classes   i64[k] positions in the label space, ascending from 0
    scores    f32[k,gh,gw] in 0..1, of these classes
    size      (h, w) px of the image
    affinity  f32[n,n] between the cells of `grid`, row by row, or None where the method kept none
    grid      (rows, columns) of the affinity; (0, 0) without one
    id        of the image, for refiners that read more about it; "" where no refiner does
    """

    classes: np.ndarray
    scores: np.ndarray
    size: tuple[int, int]
    affinity: np.ndarray | None = None
    grid: tuple[int, int] = (0, 0)
    id: str = ""


class Trainable(Protocol):
    """A torch module that the common training loop can train."""

    def load_initial(self, family: Any, init: Path) -> None:
        """Loads the weights that training starts from.

        family  the run's module of pipeline/nn, which reads files of its backbones
        init    the weights file

        FileNotFoundError; ValueError if the weights do not fit.
        """
        ...

    def phases(self) -> list[Phase]: ...

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        """The parameters that this phase trains."""
        ...

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Scalar losses by name, already weighted, each a mean over the sub-batch; the loop minimises their sum."""
        ...


@runtime_checkable
class Scored(Protocol):
    """Optional member of a Trainable, required where a phase has keep_best: selects the epoch without ground truth."""

    def score(self, batch: Batch) -> Tensor:
        """f32[2]: a sum of scores over the batch, higher for better weights, and the number of summands.

        The loop calls it after each epoch on the same training images without augmentation, in eval mode and without
        gradient, and divides the total of the sums by the total of the numbers.
        """
        ...


class Method(Trainable, Protocol):
    """Entry of pipeline/methods/<name>/method.py, beside its frozen dataclasses Params (train.model) and Options
    (extract.options).

    stride  px per cell of the network's feature grid; sides of the images given to score_maps are multiples of it
    """

    stride: int

    def __init__(self, labels: LabelSpace, params: Any, schedule: Any, family: Any) -> None:
        """schedule: training.settings.Schedule; family: the run's module of pipeline/nn."""
        ...

    def score_maps(self, images: Tensor, options: Any, *, keep_affinity: bool = False) -> ScoreMaps:
        """images f32[b,3,h,w] RGB in 0..1. The affinity may be None unless keep_affinity is True."""
        ...

    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Intermediate tensors by name, for the report.

        f32[b,c,gh,gw] is drawn as the map of each image's first class; f32[b,layers,heads] under a name that ends in
        `_weights` is shown as a table.
        """
        ...


@runtime_checkable
class WithSurroundings(Protocol):
    """Optional member of a Method that suppresses what surrounds its classes (water around boats, say)."""

    def surroundings(self, images: Tensor, pairs: Tensor) -> Surroundings:
        """images f32[b,3,h,w] RGB in 0..1; pairs i64[p,2] (position in the batch, class of that image's tags), p >= 1.

        extract asks for it on every training image once; the report shows the images that match best, by class.
        """
        ...


class Segmenter(Trainable, Protocol):
    """Entry of pipeline/segmenters/<name>/segmenter.py, beside its frozen dataclasses Params (retrain.model) and Options
    (segment.options)."""

    def __init__(self, labels: LabelSpace, params: Any, schedule: Any, family: Any) -> None:
        """As Method's; family is the module of pipeline/nn with the segmenter's name."""
        ...

    def segment(self, images: Tensor, options: Any) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1 → logits f32[b,c+1,h,w], plane 0 background."""
        ...


class Refiner(Protocol):
    """Score maps of an image → probabilities per pixel, by what RefinerModule.fit learned.

    A learned refiner (LearnedRefiner) is given its trained network, in eval mode, as a third argument.
    """

    def __init__(self, params: Any, state: Mapping[str, np.ndarray]) -> None: ...

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """image u8[h,w,3] RGB, maps with k >= 1 classes → f32[k+1,h,w] that sums to 1, plane 0 background.

        threshold: a score above 0; below it, a class is background as far as the score maps alone decide.
        """
        ...


@runtime_checkable
class RefinerModule(Protocol):
    """pipeline/refiners/<name>/refiner.py. FitParams: frozen dataclass of section fit_refiner; Params: of refine.options."""

    FitParams: type[Any]
    Params: type[Any]
    Refiner: Callable[..., Any]

    def fit(self, params: Any, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
        """The refiner's state, of which `threshold` f32[1] > 0 is part, from all training images without ground truth.

        maps    of every training image once, streamed
        images  position in `maps` → the image u8[h,w,3] RGB
        """
        ...


@runtime_checkable
class LearnedRefiner(RefinerModule, Protocol):
    """A refiner with a network that the training loop trains, after `fit`.

    FitParams  extends training.settings.LearnedFit
    Network    a Trainable, built as Network(params.model, params.schedule, family)
    """

    Network: Callable[..., Any]

    def training_labels(self, params: Any, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """What the network learns of one training image: u8[h,w] mask values, 255 where they are uncertain."""
        ...


@runtime_checkable
class CheckedRefiner(RefinerModule, Protocol):
    """A refiner whose FitParams name things outside the project, such as files."""

    def check(self, params: Any) -> None:
        """ValueError, before anything is trained, if one of them is missing or not what the params say."""
        ...


@runtime_checkable
class SupervisedRefiner(RefinerModule, Protocol):
    """A refiner that may bring something which learned from more than image-level tags."""

    def supervision(self, params: Any) -> str | None:
        """FitParams → what that was, for metrics and report: "saliency (pixel masks of DUTS-TR)". None: tags alone."""
        ...


@runtime_checkable
class DeviceRefiner(Refiner, Protocol):
    """A refiner that is not trained here, but may run a network."""

    def to(self, device: str) -> None:
        """Moves the network to a torch device."""
        ...


@runtime_checkable
class AffinityMethod(Protocol):
    """Module of a method whose score_maps have an affinity where it is asked for. HAS_AFFINITY: True."""

    HAS_AFFINITY: bool


@runtime_checkable
class AffinityRefiner(RefinerModule, Protocol):
    """A refiner that may read ImageMaps.affinity. NEEDS_AFFINITY: whether it fails without."""

    NEEDS_AFFINITY: bool


@dataclass(frozen=True, slots=True)
class Listing:
    """An image as a data set lists it, before prepare opens any file.

    path    of the image file, relative to dataset.root; of one in a tar shard `<shard>.tar/<name in it>`
    split   "train" or "val"
    tags    class names, or None where the image was never tagged
    mask    whether Dataset.truth has a mask of it
    offset  bytes before the image file in its shard
    length  of the image file there, in bytes; None: it lies in no shard
    """

    id: str
    path: Path
    split: str
    tags: tuple[str, ...] | None
    mask: bool
    offset: int = 0
    length: int | None = None


class Dataset(Protocol):
    """Entry of pipeline/datasets/<name>/dataset.py, beside its frozen dataclass Params (dataset.options)."""

    labels: LabelSpace

    def __init__(self, root: Path, params: Any) -> None:
        """root: the folder of raw data, read-only."""
        ...

    def listings(self) -> list[Listing]:
        """All images, in any order. DatasetError (pipeline/listing.py) with every problem of the lists and tags; its
        `listings` hold the images, with unique ids, that could be listed nevertheless."""
        ...

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values of an image whose listing.mask is True."""
        ...


@runtime_checkable
class DatasetWithWarnings(Protocol):
    """A data set that has seen what is likely a mistake of its user, and no error. warnings: a text per mistake."""

    warnings: Sequence[str]


@runtime_checkable
class ExporterModule(Protocol):
    """pipeline/exporters/<name>.py: pseudo-masks in a format of other tools."""

    def write(self, masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
        """Writes the format into folder `out`, made where it is missing. masks: (id, u8[h,w] mask values) in id order,
        streamed, each of an image in records."""
        ...


@runtime_checkable
class CheckedExporter(ExporterModule, Protocol):
    """An exporter that needs something beyond the project's own dependencies."""

    def check(self) -> None:
        """ValueError, before any training, if it is missing."""
        ...
