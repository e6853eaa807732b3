"""Pixel-adaptive refinement of background and present classes, after the image's own colours (AFA, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core.config import AboveZero, Positive, Range
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold
from pipeline.imaging.par import pixel_adaptive_refine


@dataclass(frozen=True)
class FitParams:
    """fit_refiner.<m>."""

    background: threshold.Background


@dataclass(frozen=True)
class Params:
    """refine.<m>.options.

    scale        the image is refined at this share of its size, and the planes enlarged again (AFA: 0.5)
    planes       softmax: probabilities are the softmax of [level, scores] (AFA, which flattens them); share: their shares of the sum
    dilations    px at that size: distances of the neighbours
    iterations   AFA: 10 on VOC, 15 on COCO
    w1, w2       width of the colour term, weight of the distance term
    """

    scale: Annotated[float, Range(low=0.1, high=1)]
    planes: Literal["softmax", "share"]
    dilations: tuple[Positive, ...]
    iterations: Positive
    w1: AboveZero
    w2: AboveZero

    def __post_init__(self) -> None:
        if not self.dilations:
            raise ValueError("dilations: got [], allowed is at least one distance in px")


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
        h, w = maps.size
        size = max(1, int(h * self.params.scale)), max(1, int(w * self.params.scale))
        stacked = torch.from_numpy(planes.with_background(planes.upsample(maps.scores, maps.size), level))[None]
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].float() / 255
        small = F.interpolate(stacked, size, mode="bilinear", align_corners=False)
        shares = small.softmax(dim=1) if self.params.planes == "softmax" else small / small.sum(dim=1, keepdim=True)
        refined = pixel_adaptive_refine(
            F.interpolate(pixels, size, mode="bilinear", align_corners=False),
            shares,
            dilations=self.params.dilations,
            iterations=self.params.iterations,
            w1=self.params.w1,
            w2=self.params.w2,
        )
        full = F.interpolate(refined, (h, w), mode="bilinear", align_corners=False)[0]
        return (full / full.sum(dim=0)).numpy()
