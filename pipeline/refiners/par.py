"""Pixel-adaptive refinement of background and present classes, after the image's own colours (AFA, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold
from pipeline.imaging.par import ParSettings, refine_image


@dataclass(frozen=True)
class FitParams:
    """fit_refiner.<m>."""

    background: threshold.Background


@dataclass(frozen=True)
class Params:
    """refine.<m>.options.

    planes  softmax: probabilities are the softmax of [level, scores] (AFA, which flattens them); share: their shares of the sum
    par     the refinement
    """

    planes: Literal["softmax", "share"]
    par: ParSettings


def fit(params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """The background level; the refinement itself has nothing to fit."""
    del images
    return threshold.fit(params.background, maps)


class Refiner:
    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        del state
        torch.set_num_threads(1)  # images share the cores
        self.params = params

    def __call__(self, image: np.ndarray, maps: ImageMaps, level: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background."""
        full = torch.from_numpy(planes.with_background(planes.upsample(maps.scores, maps.size), level))[None]
        small = F.interpolate(full, self.params.par.size(maps.size), mode="bilinear", align_corners=False)[0]
        shares = small.softmax(dim=0) if self.params.planes == "softmax" else small / small.sum(dim=0)
        refined = refine_image(image, shares, self.params.par)
        return (refined / refined.sum(dim=0)).numpy()
