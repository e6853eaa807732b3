"""No refinement: score maps and the background level, as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold


@dataclass(frozen=True)
class FitParams:
    """fit_refiner.<m>."""

    background: threshold.Background


@dataclass(frozen=True)
class Params:
    """refine.<m>.options: none."""


def fit(params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """The background level."""
    del images
    return threshold.fit(params.background, maps)


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del params, state

    def __call__(self, image: np.ndarray, maps: ImageMaps, level: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1; plane 0, background, has weight `level` against the scores."""
        del image
        stacked = planes.with_background(planes.upsample(maps.scores, maps.size), level)
        return stacked / stacked.sum(axis=0)
