"""No refinement: score maps against the threshold, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes
from pipeline.imaging.threshold import FitParams
from pipeline.imaging.threshold import fit_threshold as fit

__all__ = ["FitParams", "Params", "Refiner", "fit"]


@dataclass(frozen=True)
class Params:
    """refine.options: none."""


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del params, state

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1; plane 0, background, is the threshold against the scores."""
        del image
        stacked = planes.with_background(planes.upsample(maps.scores, maps.size), threshold)
        return stacked / stacked.sum(axis=0)
