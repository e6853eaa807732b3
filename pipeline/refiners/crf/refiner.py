"""Dense CRF over background and the classes that are present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pipeline.core.contracts import ImageMaps
from pipeline.crf import CrfSettings, dense_crf, unary_from_labels, unary_from_probabilities
from pipeline.imaging import planes
from pipeline.imaging.threshold import FitParams
from pipeline.imaging.threshold import fit_threshold as fit

__all__ = ["FitParams", "Params", "Refiner", "fit"]


@dataclass(frozen=True)
class Params:
    """refine.options.

    unary      soft: probabilities are the planes [threshold, scores] raised to `sharpness` and normalised;
               hard: the winning plane has probability gt_prob (WeakTr, IRN)
    gt_prob    only hard uses it
    sharpness  only soft uses it; 1 takes the scores as they are
    """

    unary: Literal["soft", "hard"]
    gt_prob: Annotated[float, Field(ge=0.5, le=0.999)]
    sharpness: Annotated[float, Field(ge=0.1, le=32)]
    crf: CrfSettings


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del state
        self.params = params

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] probabilities, plane 0 background."""
        stacked = planes.with_background(planes.upsample(maps.scores, maps.size), threshold)
        if self.params.unary == "hard":
            unary = unary_from_labels(stacked.argmax(axis=0), len(stacked), gt_prob=self.params.gt_prob)
        else:
            share = stacked / stacked.max(axis=0)  # the winner is 1, so that no power underflows everywhere at once
            sharp = share ** np.float32(self.params.sharpness)
            unary = unary_from_probabilities(sharp / sharp.sum(axis=0))
        return dense_crf(image, unary, self.params.crf)
