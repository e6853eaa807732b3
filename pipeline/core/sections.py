"""The sections of params.yaml that belong to stages. Plug-ins keep their own Params beside the code that uses them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core import config
from pipeline.core.config import PARAMS_FILE, AboveZero, Count, Positive, Share

Compression = Literal["gzip", "zstd", "none"]

# those that have a part for each entry of `methods`
OF_COLUMNS = ("train", "extract", "fit_refiner", "refine", "export", "cross_validate", "retrain", "segment")
TOP_LEVEL = ("dataset", "methods", "prepare", *OF_COLUMNS, "evaluate", "report")


@dataclass(frozen=True)
class Dataset:
    """`root` is where the raw images lie; `options` goes to pipeline/datasets/<name>.py's Params."""

    name: str
    root: str
    options: Any


@dataclass(frozen=True)
class Column:
    """methods.<m>: the slots of one column of the DAG. `init` and `segmenter_init` are files, or scratch."""

    backbone: str
    init: str
    refiner: str
    segmenter: str
    segmenter_init: str


@dataclass(frozen=True)
class Prepare:
    """audit_list  null, or a text file under dataset.root with one id per line: only their masks are taken as truth"""

    on_bad_image: Literal["fail", "skip"]
    compression: Compression
    audit_list: str | None


@dataclass(frozen=True)
class Extract:
    """extract.<m>: views and storage, the same for every method; `options` goes to the method's Options.

    scales      image side factors; each view's sides are rounded to the backbone's stride so that no pixel is lost
    long_side   px, or null: larger images are first scaled down to it, which bounds memory
    merge       how views become one map: rule of imaging.scoremaps.merge_views
    stride      px of the image per score-map cell
    tag_threshold  on val, classes whose sigmoid(tag_logits) reaches it are kept
    keep_affinity  whether the method's affinity of the last of `scales` is kept, n² values an image, for refiner walk
    inspect     number of training images whose inner maps the report shows; 0: nothing of a method's inside
    """

    scales: tuple[Annotated[float, Field(ge=0.1, le=4)], ...]
    long_side: Positive | None
    flip: bool
    merge: Literal["irn", "afa", "weaktr", "mean"]
    stride: Annotated[int, Field(ge=1, le=32)]
    views_per_batch: Positive
    tag_threshold: Share
    keep_affinity: bool
    precision: Literal["fp32", "bf16", "fp16"]
    images_per_part: Positive
    compression: Compression
    inspect: Count
    options: Any


@dataclass(frozen=True)
class Refine:
    """refine.<m>: `options` goes to the refiner's Params.

    disagree_at  null, or two background levels (low, high) as factors of the fitted one: pixels whose labels differ
                 between them are marked, and export may set them to 255
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
    """export.<m>: which pixels become 255, and in which formats the masks are written beside the HDF5 store."""

    ignore_below: Share
    ignore_disagreement: bool
    formats: tuple[str, ...]
    images_per_part: Positive
    compression: Compression


@dataclass(frozen=True)
class CrossValidate:
    """cross_validate.<m>: how far segmenters that never saw a pseudo-mask agree with it.

    folds        0: off; else the train images are cut into so many, and one segmenter is trained without each of them
    temperature  of the soft-min over an image's pixels: small ones ask for the least believed pixels, large ones for the mean
    """

    folds: Count
    temperature: AboveZero

    def __post_init__(self) -> None:
        if self.folds == 1:
            raise ValueError("folds: got 1, allowed is 0 (off) or a whole number >= 2")


@dataclass(frozen=True)
class Segment:
    """segment.<m>: sliding windows of `window` px every `window_stride` px on the image scaled by each of `scales`.

    short_side  px of the short side at scale 1, or null: the image's own size
    crf         null, or the keys of crf.CrfSettings
    options     goes to the segmenter's Options
    """

    scales: tuple[Annotated[float, Field(ge=0.1, le=4)], ...]
    flip: bool
    short_side: Positive | None
    window: Positive
    window_stride: Positive
    precision: Literal["fp32", "bf16", "fp16"]
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
class Evaluate:
    """What is scored, and which pictures the report gets.

    ignored_prediction  how 255 in pseudo-masks counts: out of the count, as background, or as a miss
    gallery             number of images that the report shows at most: half of them random, the others the worst
    thumbnail           px of their long side
    """

    ignored_prediction: Literal["excluded", "background", "miss"]
    threshold_bins: Annotated[int, Field(ge=10, le=1000)]
    gallery: Count
    thumbnail: Annotated[int, Field(ge=32, le=512)]


@dataclass(frozen=True)
class Report:
    """palette: colours of classes, VOC's or ones that colour-blind people tell apart; review: rows per method in review.csv."""

    title: str
    palette: Literal["voc", "safe"]
    review: Count


def read(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole file, its top-level keys checked. ParamsError names what is unknown or missing."""
    values = config.read(path)
    problems = [f"unknown section {key!r}" for key in values if key not in TOP_LEVEL]
    problems += [f"section {key!r} is missing" for key in TOP_LEVEL if key not in values]
    if problems:
        raise config.ParamsError(f"{path}: {'; '.join(problems)}; allowed are {', '.join(TOP_LEVEL)} (edit {path})")
    return values


def dataset(values: dict[str, Any]) -> Dataset:
    return config.parse(Dataset, values["dataset"], "dataset")


def column(values: dict[str, Any], key: str) -> Column:
    return config.parse(Column, config.section(values, "methods", key), f"methods.{key}")
