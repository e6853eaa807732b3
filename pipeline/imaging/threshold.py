"""Score maps of all training images → one background level, without masks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from pipeline.core.config import Range
from pipeline.core.contracts import ImageMaps

BINS = 500
LOWEST, HIGHEST = 0.02, 0.98


@dataclass(frozen=True)
class Background:
    """Where a score stops being background.

    rule   fixed takes `level` as it is (a paper's value); otsu splits the histogram of winning scores over all training images
           into the two groups that differ most (Otsu 1979), times `level` as a factor
    level  0..1 for fixed; a factor for otsu
    """

    rule: Literal["fixed", "otsu"]
    level: Annotated[float, Range(above=0, high=2)]

    def __post_init__(self) -> None:
        if self.rule == "fixed" and self.level >= 1:
            raise ValueError(f"level {self.level} with rule fixed: allowed is between 0 and 1, since scores end at 1")


def fit(background: Background, maps: Iterable[ImageMaps]) -> dict[str, np.ndarray]:
    """A refiner's state: `background` f32[1] in 0..1. The maps are streamed, and not touched where the rule is fixed."""
    level = background.level if background.rule == "fixed" else background.level * otsu(winner_histogram(maps))
    return {"background": np.array([np.clip(level, LOWEST, HIGHEST)], np.float32)}


def winner_histogram(maps: Iterable[ImageMaps]) -> np.ndarray:
    """i64[BINS]: how many grid cells have their best class's score in each bin of 0..1. Images without a class do not count."""
    counts = np.zeros(BINS, np.int64)
    for one in maps:
        if len(one.classes):
            best = np.clip(one.scores.max(axis=0), 0, 1)
            counts += np.bincount(np.minimum((best * BINS).astype(np.int64), BINS - 1).ravel(), minlength=BINS)
    return counts


def otsu(histogram: np.ndarray) -> float:
    """The level in 0..1 that maximises the variance between the two sides. ValueError for an empty histogram."""
    if not histogram.sum():
        raise ValueError(
            "no training image has a score map with a class, so no background level can be fitted; set rule to fixed"
        )
    centres = (np.arange(len(histogram)) + 0.5) / len(histogram)
    weight = histogram / histogram.sum()
    below, mass = np.cumsum(weight), np.cumsum(weight * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below - mass) ** 2 / (below * (1 - below))
    return float((np.nanargmax(np.where(np.isfinite(between), between, -1)) + 1) / len(histogram))
