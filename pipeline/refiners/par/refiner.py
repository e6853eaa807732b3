"""Pixel-adaptive refinement of background and present classes, after the image's own colours (AFA, section 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes
from pipeline.imaging.par import ParSettings, refine_image
from pipeline.imaging.planes import Probabilities
from pipeline.imaging.threshold import FitParams
from pipeline.imaging.threshold import fit_threshold as fit

__all__ = ["FitParams", "Params", "Refiner", "fit"]


@dataclass(frozen=True)
class Params:
    """refine.options.

    planes  softmax: probabilities are the softmax of [threshold, scores] (AFA, which flattens them); share: their shares of
            the sum
    par     the refinement
    """

    planes: Probabilities
    par: ParSettings


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del state
        self.params = params

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background."""
        full = torch.from_numpy(planes.with_background(planes.upsample(maps.scores, maps.size), threshold))[None]
        small = F.interpolate(full, self.params.par.size(maps.size), mode="bilinear", align_corners=False)[0]
        refined = refine_image(image, planes.probabilities(small, self.params.planes), self.params.par)
        return (refined / refined.sum(dim=0)).numpy()
