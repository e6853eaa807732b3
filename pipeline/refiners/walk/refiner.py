"""One step along the method's own affinity, then perhaps pixel-adaptive refinement (AFA, section 3, steps 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core.config import AboveZero, Count
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes
from pipeline.imaging.affinity import propagate
from pipeline.imaging.par import ParSettings, refine_image
from pipeline.imaging.planes import Probabilities
from pipeline.imaging.threshold import FitParams
from pipeline.imaging.threshold import fit_threshold as fit

__all__ = ["NEEDS_AFFINITY", "FitParams", "Params", "Refiner", "fit"]

NEEDS_AFFINITY = True  # stages/check.py then tells before anything is trained if extract would keep none


@dataclass(frozen=True)
class Params:
    """refine.options.

    planes  softmax: probabilities are the softmax of [threshold, scores] (AFA, which flattens them); share: their shares of
            the sum
    radius  cells of the affinity's grid that one step reaches (AFA: 8)
    power   of the affinity; higher keeps to the most alike (AFA: 2)
    eps     added to each cell's sum of affinities: cells that resemble nothing fade. AFA has 0.1 for its sigmoid affinities;
            those of attention, whose rows sum to 1 over all cells, need about 1e-6
    par     null, or the pixel-adaptive refinement that follows
    """

    planes: Probabilities
    radius: Count
    power: AboveZero
    eps: AboveZero
    par: ParSettings | None


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del state
        self.params = params

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background. ValueError where the score maps have no affinity."""
        if maps.affinity is None:
            raise ValueError(
                "refiner walk needs an affinity and the score maps have none: set extract.keep_affinity to true in the "
                "recipe "
                "(weaktr has an affinity, cam has none), or choose refiner par"
            )
        full = torch.from_numpy(planes.with_background(maps.scores, threshold))[None]
        grid = F.interpolate(full, maps.grid, mode="bilinear", align_corners=False)[0]
        shares = planes.probabilities(grid, self.params.planes)[None]
        affinity = torch.from_numpy(maps.affinity)[None]
        spread = propagate(shares, affinity, radius=self.params.radius, power=self.params.power, eps=self.params.eps)
        refined = F.interpolate(spread, maps.size, mode="bilinear", align_corners=False)[0]
        if self.params.par is not None:
            refined = refine_image(image, refined, self.params.par)
        total = refined.sum(dim=0)
        refined[0][total <= 0] = 1  # resembles nothing at all: background
        return (refined / refined.sum(dim=0)).numpy()
