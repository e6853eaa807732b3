"""Score maps of all training images → one background level, without masks."""

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
class Background:
    """Where a score stops being background.

    rule   fixed takes `level` as it is (a paper's value). The others look at the histogram of winning scores over all training
           images (Otsu 1979): otsu splits it into the two groups that differ most; otsu3 into three, background, undecided and
           object, and takes the upper border, since a CAM leaks widely into what surrounds an object at middling scores
    level  0..1 for fixed; a factor on the border that the other rules find
    """

    rule: Literal["fixed", "otsu", "otsu3"]
    level: Annotated[float, Field(gt=0, le=2)]

    def __post_init__(self) -> None:
        if self.rule == "fixed" and self.level >= 1:
            raise ValueError(f"level {self.level} with rule fixed: allowed is between 0 and 1, since scores end at 1")


@dataclass(frozen=True)
class FitParams:
    """fit_refiner.<m> of the refiners that have nothing to fit but the background level."""

    background: Background


def fit_background(
    params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]
) -> dict[str, np.ndarray]:
    """The `fit` of such refiners."""
    del images
    return fit(params.background, maps)


def fit(background: Background, maps: Iterable[ImageMaps]) -> dict[str, np.ndarray]:
    """A refiner's state: `background` f32[1] in 0..1. The maps are streamed, and not touched where the rule is fixed."""
    if background.rule == "fixed":
        level = background.level
    else:
        borders = otsu(winner_histogram(maps), groups=2 if background.rule == "otsu" else 3)
        level = background.level * borders[-1]
    return {"background": np.array([np.clip(level, LOWEST, HIGHEST)], np.float32)}


def winner_histogram(maps: Iterable[ImageMaps]) -> np.ndarray:
    """i64[BINS]: how many grid cells have their best class's score in each bin of 0..1. Images without a class do not count."""
    counts = np.zeros(BINS, np.int64)
    for one in maps:
        if len(one.classes):
            best = np.clip(one.scores.max(axis=0), 0, 1)
            counts += np.bincount(np.minimum((best * BINS).astype(np.int64), BINS - 1).ravel(), minlength=BINS)
    return counts


def otsu(histogram: np.ndarray, *, groups: int) -> list[float]:
    """The groups - 1 borders in 0..1 that maximise the variance between 2 or 3 groups. ValueError for an empty histogram.

    Where several borders are equally good (an empty stretch of the histogram), their middle is taken.
    """
    if not histogram.sum():
        raise ValueError(
            "no training image has a score map with a class, so no background level can be fitted; set rule to fixed"
        )
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
