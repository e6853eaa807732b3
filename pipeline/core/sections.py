"""params.yaml and the recipes that it names → settings of one run. Plug-ins keep their own Params beside the code that uses
them.

params.yaml holds what differs from user to user; a recipe holds the settings of one method for one kind of data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from pipeline.core import config
from pipeline.core.config import PARAMS_FILE, AboveZero, Count, Positive, Precision, Share

Compression = Literal["gzip", "zstd", "none"]
T = TypeVar("T")

TOP_LEVEL = ("dataset", "methods", "prepare", "export", "evaluate", "report")  # of params.yaml
OF_RECIPE = ("train", "extract", "fit_refiner", "refine", "cross_validate", "retrain", "segment", "relabel")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # it names folders and files


@dataclass(frozen=True)
class Dataset:
    """Section dataset.

    name     a folder of pipeline/datasets
    root     where the raw images lie
    options  of the data set
    """

    name: str
    root: str
    options: Any


@dataclass(frozen=True)
class Run:
    """methods.<run>: one chain of stages. The key is the run's own name, so that runs of one method stand side by side.

    method          a folder of pipeline/methods
    recipe          file with the settings of each stage
    backbone        a folder of pipeline/nn: the family of the method's network
    init            file of the backbone's initial weights; one that ends in .txt: start from random weights
    refiner         a folder of pipeline/refiners
    segmenter       a folder of pipeline/segmenters, and of pipeline/nn
    segmenter_init  file of the segmenter's initial weights, as init
    """

    method: str
    recipe: str
    backbone: str
    init: str
    refiner: str
    segmenter: str
    segmenter_init: str


@dataclass(frozen=True)
class Prepare:
    """Section prepare.

    on_bad_image  what an image or a mask that cannot be read does: fail stops with a list, skip leaves it out and says so
    compression   of the HDF5 files
    audit_list    null, or a text file under dataset.root with one id per line: only their masks are taken as truth
    """

    on_bad_image: Literal["fail", "skip"]
    compression: Compression
    audit_list: str | None


@dataclass(frozen=True)
class Extract:
    """Section extract: views and storage, the same for every method; `options` goes to the method's Options.

    scales      image side factors; each view's sides are rounded to the backbone's stride so that no pixel is lost
    long_side   px, or null: larger images are first scaled down to it, which bounds memory
    flip        whether each view is also seen mirrored
    merge       how views become one map: rule of imaging.scoremaps.merge_views
    stride      px of the image per score-map cell
    views_per_batch  views that go through the network together; more need more memory
    tag_threshold  on val, classes whose sigmoid(tag_logits) reaches it are kept
    keep_affinity  whether the method's affinity of the last of `scales` is kept, n² values an image, for refiner walk
    precision   of the network: fp32; tf32, which is fp32 with products of 10 bits on an NVIDIA GPU (as fp32 on a CPU); bf16
                and fp16 where the processor is fast at them
    images_per_part  images in a file of the store
    compression  of the store
    inspect     number of training images whose inner maps the report shows; 0: nothing of a method's inside
    options     of the method
    """

    scales: tuple[Annotated[float, Field(ge=0.1, le=4)], ...]
    long_side: Positive | None
    flip: bool
    merge: Literal["irn", "afa", "weaktr", "mean"]
    stride: Annotated[int, Field(ge=1, le=32)]
    views_per_batch: Positive
    tag_threshold: Share
    keep_affinity: bool
    precision: Precision
    images_per_part: Positive
    compression: Compression
    inspect: Count
    options: Any


@dataclass(frozen=True)
class Refine:
    """Section refine: `options` goes to the refiner's Params.

    disagree_at  null, or two thresholds (low, high) as factors of the fitted one: pixels whose labels differ
                 between them are marked, and export may set them to 255
    images_per_part  images in a file of the store
    compression  of the store
    options      of the refiner
    """

    disagree_at: tuple[AboveZero, AboveZero] | None
    images_per_part: Positive
    compression: Compression
    options: Any

    def __post_init__(self) -> None:
        pair = self.disagree_at
        if pair is not None and pair[0] >= pair[1]:
            raise ValueError(f"disagree_at: got {list(pair)}, allowed is null or [low, high] with low < high")


@dataclass(frozen=True)
class Export:
    """Section export of params.yaml: which pixels become 255, and in which formats the masks are written.

    ignore_below         probability under which a pixel becomes 255
    ignore_disagreement  whether the pixels that refine.disagree_at marks become 255
    formats              hdf5 always; others beside it: docs/exports.md
    images_per_part      images in a file of the HDF5 store
    compression          of the HDF5 store
    """

    ignore_below: Share
    ignore_disagreement: bool
    formats: tuple[str, ...]
    images_per_part: Positive
    compression: Compression


@dataclass(frozen=True)
class CrossValidate:
    """Section cross_validate: how far segmenters that never saw a pseudo-mask agree with it.

    folds        0: off; else the train images are cut into so many, and one segmenter is trained without each of them
    temperature  of the soft-min over an image's pixels: small ones ask for the least believed pixels, large ones for the
                 mean
    """

    folds: Count
    temperature: AboveZero

    def __post_init__(self) -> None:
        if self.folds == 1:
            raise ValueError("folds: got 1, allowed is 0 (off) or a whole number >= 2")


@dataclass(frozen=True)
class Segment:
    """Section segment: sliding windows of `window` px every `window_stride` px on the image scaled by each of `scales`.

    scales      image side factors, whose probabilities are averaged
    flip        whether each view is also seen mirrored
    short_side  px of the short side at scale 1, or null: the image's own size
    window      px, side of the square window, usually retrain.augment.size or a little more
    window_stride  px between windows, at most `window`
    precision   of the network: fp32; tf32, which is fp32 with products of 10 bits on an NVIDIA GPU (as fp32 on a CPU); bf16
                and fp16 where the processor is fast at them
    crf         null, or the keys of crf.CrfSettings
    images_per_part  images in a file of the store
    compression  of the store
    options     of the segmenter
    """

    scales: tuple[Annotated[float, Field(ge=0.1, le=4)], ...]
    flip: bool
    short_side: Positive | None
    window: Positive
    window_stride: Positive
    precision: Precision
    crf: Any
    images_per_part: Positive
    compression: Compression
    options: Any

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("scales: got [], allowed is at least one scale")
        if self.window_stride > self.window:
            raise ValueError(
                f"window_stride: got {self.window_stride}, allowed is at most window ({self.window}), or pixels are missed"
            )


@dataclass(frozen=True)
class Relabel:
    """Section relabel: what the trained segmenter sees in the train images, in the views of section segment. Only classes of
    the image's tags can win; where nobody tagged it, all can.

    enabled  whether it looks at them; without, the store has no images
    crf      null, or the keys of crf.CrfSettings
    """

    enabled: bool
    crf: Any


@dataclass(frozen=True)
class Evaluate:
    """What is scored, and which pictures the report gets.

    ignored_prediction  how 255 in pseudo-masks counts: out of the count, as background, or as a miss
    threshold_bins      thresholds of the score maps that are tried against the truth
    gallery             number of images that the report shows at most: half of them random, the others the worst
    thumbnail           px of their long side
    """

    ignored_prediction: Literal["excluded", "background", "miss"]
    threshold_bins: Annotated[int, Field(ge=10, le=1000)]
    gallery: Count
    thumbnail: Annotated[int, Field(ge=32, le=512)]


@dataclass(frozen=True)
class Report:
    """Section report.

    title    of the page
    palette  colours of classes: VOC's, or ones that colour-blind people can tell apart
    review   rows per run in review.csv: the worst images
    """

    title: str
    palette: Literal["voc", "safe"]
    review: Count


def read(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole of params.yaml, its top-level keys checked. ParamsError names what is unknown or missing."""
    return _with_keys(config.read(path), TOP_LEVEL, path)


def read_recipe(path: Path) -> dict[str, Any]:
    """A whole recipe, its top-level keys checked. ParamsError names what is unknown or missing."""
    if not path.is_file():
        recipes = ", ".join(sorted(other.as_posix() for other in path.parent.glob("*.yaml"))) or "none"
        raise config.ParamsError(
            f"recipe {path} is missing (beside it: {recipes}); name another in methods.<run>.recipe of {PARAMS_FILE}"
        )
    return _with_keys(config.read(path), OF_RECIPE, path)


def _with_keys(values: dict[str, Any], allowed: tuple[str, ...], path: Path) -> dict[str, Any]:
    problems = [f"unknown section {key!r}" for key in values if key not in allowed]
    problems += [f"section {key!r} is missing" for key in allowed if key not in values]
    if problems:
        raise config.ParamsError(f"{path}: {'; '.join(problems)}; allowed are {', '.join(allowed)} (edit {path})")
    return values


def dataset(values: Mapping[str, Any]) -> Dataset:
    return config.parse(Dataset, values["dataset"], "dataset")


def runs(values: Mapping[str, Any]) -> list[str]:
    """Names of the runs, in their order. ParamsError if there is none, or one cannot be the name of a folder."""
    names = list(values["methods"]) if isinstance(values["methods"], dict) else []
    if not names:
        raise config.ParamsError(f"{PARAMS_FILE}: methods must name at least one run (edit {PARAMS_FILE})")
    wrong = [name for name in names if not isinstance(name, str) or not RUN_NAME.fullmatch(name)]
    if wrong:
        raise config.ParamsError(
            f"{PARAMS_FILE}: methods: {', '.join(map(repr, wrong))} cannot name a run; allowed are letters, digits, `-`, "
            f"`_` and `.`, "
            f"the first a letter or a digit (edit {PARAMS_FILE})"
        )
    return names


@dataclass(frozen=True)
class Settings:
    """All that params.yaml and its recipe say about one run. A section is parsed when it is asked for, so that a stage
    parses, and imports, no other stage's."""

    name: str
    run: Run
    dataset: Dataset
    params: Mapping[str, Any]
    recipe: Mapping[str, Any]

    @classmethod
    def read(cls, name: str, path: Path = PARAMS_FILE) -> Settings:
        """ParamsError if the file, the run or its recipe is missing or wrong."""
        values = read(path)
        runs(values)
        run = config.parse(Run, config.section(values, "methods", name, file=path), f"methods.{name}", path)
        return cls(name, run, dataset(values), values, read_recipe(Path(run.recipe)))

    @property
    def file(self) -> Path:
        """Of the recipe, for errors."""
        return Path(self.run.recipe)

    @property
    def root(self) -> Path:
        """Folder of the raw images."""
        return Path(self.dataset.root)

    def section(self, kind: type[T], name: str) -> T:
        """A section of the recipe."""
        return config.parse(kind, config.section(self.recipe, name, file=self.file), name, self.file)

    def shared(self, kind: type[T], name: str) -> T:
        """A section of params.yaml, which all runs share."""
        return config.parse(kind, config.section(self.params, name), name)

    def part(self, kind: type[T], values: Any, where: str) -> T:
        """What a plug-in calls its own within a section of the recipe; `where` is its dotted key."""
        return config.parse(kind, values, where, self.file)
