"""Score maps of all training images → one threshold between background and classes, without masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pipeline.core.contracts import ImageMaps

BINS = 500
LOWEST, HIGHEST = 0.02, 0.98


@dataclass(frozen=True)
class FixedThreshold:
    """A threshold as it is.

    rule   fixed
    value  0..1, a paper's value
    """

    rule: Literal["fixed"]
    value: Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class OtsuThreshold:
    """A threshold found in the histogram of winning scores over all training images (Otsu 1979).

    rule    otsu splits the histogram into the two groups that differ most; otsu3 into three, background, undecided and
            object, and takes the upper border, since a CAM leaks widely into what surrounds an object at middling scores
    factor  on the border that the rule finds
    """

    rule: Literal["otsu", "otsu3"]
    factor: Annotated[float, Field(gt=0, le=2)]


# where a score stops being background
Threshold = Annotated[FixedThreshold | OtsuThreshold, Field(discriminator="rule")]


@dataclass(frozen=True)
class FitParams:
    """Section fit_refiner of the refiners that have nothing to fit but the threshold.

    threshold  where a score stops being background
    """

    threshold: Threshold


def fit_threshold(
    params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]
) -> dict[str, np.ndarray]:
    """The `fit` of such refiners."""
    del images
    return fit(params.threshold, maps)


def fit(threshold: FixedThreshold | OtsuThreshold, maps: Iterable[ImageMaps]) -> dict[str, np.ndarray]:
    """A refiner's state: `threshold` f32[1] in 0..1. The maps are streamed, and not touched where the rule is fixed."""
    if isinstance(threshold, FixedThreshold):
        value = threshold.value
    else:
        borders = otsu(winner_histogram(maps), groups=2 if threshold.rule == "otsu" else 3)
        value = threshold.factor * borders[-1]
    return {"threshold": np.array([np.clip(value, LOWEST, HIGHEST)], np.float32)}


def winner_histogram(maps: Iterable[ImageMaps]) -> np.ndarray:
    """i64[BINS]: how many grid cells have their best class's score in each bin of 0..1. Images without a class do not
    count."""
    counts = np.zeros(BINS, np.int64)
    for image in maps:
        if len(image.classes):
            best = np.clip(image.scores.max(axis=0), 0, 1)
            counts += np.bincount(np.minimum((best * BINS).astype(np.int64), BINS - 1).ravel(), minlength=BINS)
    return counts


def otsu(histogram: np.ndarray, *, groups: int) -> list[float]:
    """The groups - 1 borders in 0..1 that maximise the variance between 2 or 3 groups. ValueError for an empty histogram.

    Where several borders are equally good (an empty stretch of the histogram), their middle is taken.
    """
    if not histogram.sum():
        raise ValueError("no training image has a score map with a class, so no threshold can be fitted; set rule to fixed")
    bins = len(histogram)
    weight = histogram / histogram.sum()
    count = np.concatenate([[0], np.cumsum(weight)])
    mass = np.concatenate([[0], np.cumsum(weight * (np.arange(bins) + 0.5) / bins)])

    def spread(start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """A group's share of the variance between groups, up to a constant: weight times squared mean."""
        share = count[end] - count[start]
        return np.divide((mass[end] - mass[start]) ** 2, share, out=np.zeros(share.shape), where=share > 1e-12)

    inner = np.arange(1, bins)
    if groups == 2:
        return [_middle(spread(np.zeros_like(inner), inner) + spread(inner, np.full_like(inner, bins))) / bins]
    low, high = np.meshgrid(inner, inner, indexing="ij")
    total = spread(np.zeros_like(low), low) + spread(low, np.maximum(low, high)) + spread(high, np.full_like(high, bins))
    total[low >= high] = -1
    best_low = int(total.max(axis=1).argmax()) + 1
    return [best_low / bins, _middle(total[best_low - 1]) / bins]


def _middle(values: np.ndarray) -> int:
    """Bin border (from 1) of the highest value; of several that are equal, the middle one."""
    best = np.flatnonzero(values >= values.max() - 1e-12)
    return int(best[len(best) // 2]) + 1
