"""Score maps of one training image → a label map, by a low and a high background threshold (AFA, section 3).

Shape letters: k classes present in the image, h w pixels, gh gw cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.core.config import AboveZero, Count
from pipeline.core.labels import IGNORE
from pipeline.imaging.affinity import propagate
from pipeline.imaging.par import ParSettings, refine_pixels
from pipeline.imaging.planes import trinary_labels
from pipeline.imaging.scoremaps import resized

Window = tuple[slice, slice]


@dataclass(frozen=True)
class LabelSettings:
    """low    lower background threshold, 0..1: a pixel whose class does not exceed it is background
    high   upper background threshold, 0..1: a pixel whose class exceeds it has that class; between the two it is ignored
    par    pixel-adaptive refinement of background and classes
    """

    low: Annotated[float, Field(gt=0, le=1)]
    high: Annotated[float, Field(gt=0, le=1)]
    par: ParSettings

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")


@dataclass(frozen=True)
class SpreadSettings(LabelSettings):
    """Settings of labels that are spread along an affinity (imaging.affinity.propagate).

    radius  cells of the affinity's grid, vertically and horizontally, that one propagation reaches
    power   exponent of the affinity
    eps     added to the affinity's column sums
    """

    radius: Count
    power: AboveZero
    eps: AboveZero


def with_backgrounds(scores: Tensor, settings: LabelSettings) -> Tensor:
    """f32[k,gh,gw] in 0..1 → f32[2,k+1,gh,gw]: softmax over [threshold, scores], of the low and of the high threshold."""
    plane = (1, *scores.shape[1:])  # filled on the device: a tensor of two numbers would be uploaded for every image
    thresholds = torch.stack([scores.new_full(plane, threshold) for threshold in (settings.low, settings.high)])
    return torch.cat([thresholds, scores.expand(2, *scores.shape)], dim=1).softmax(dim=1)


def plain_planes(scores: Tensor, settings: LabelSettings) -> Tensor:
    """f32[k,h,w] in 0..1 → planes f32[2,k+1,·,·] at PAR's size (step 7)."""
    small = resized(scores[None], settings.par.size((scores.shape[-2], scores.shape[-1])))[0]
    return with_backgrounds(small, settings)


def spread_planes(scores: Tensor, affinity: Tensor, grid: tuple[int, int], settings: SpreadSettings) -> Tensor:
    """f32[k,h,w] in 0..1 → planes f32[2,k+1,h,w] after one propagation along f32[n,n] of the cells of `grid` (step 4)."""
    planes = with_backgrounds(resized(scores[None], grid)[0], settings)
    spread = propagate(
        planes.flatten(0, 1)[None], affinity[None], radius=settings.radius, power=settings.power, eps=settings.eps
    )
    full = F.interpolate(spread, scores.shape[-2:], mode="bilinear", align_corners=False)
    return full.view(*planes.shape[:2], *scores.shape[-2:])


def refined_labels(
    pixels: Tensor, planes: Sequence[Tensor], classes: Tensor, window: Window, settings: LabelSettings
) -> list[Tensor]:
    """Image f32[3,h,w] in 0..1 and a sequence of planes f32[2,k+1,·,·] (low and high threshold) → a label map u8[h,w] of
    each: PAR, argmax, three-way rule (steps 5-6).

    All planes share PAR's weights. classes: i64[k] 0-based. window: the valid pixels; all others become 255.
    """
    stacked = [
        F.interpolate(pair, settings.par.size((pixels.shape[-2], pixels.shape[-1])), mode="bilinear", align_corners=True)
        for pair in planes
    ]
    refined = refine_pixels(pixels, torch.cat(stacked).flatten(0, 1), settings.par)
    winners = refined.view(len(planes), 2, -1, *refined.shape[1:]).argmax(dim=2)
    values = F.pad(classes + 1, (1, 0)).to(torch.uint8)  # plane number → mask value
    labels = []
    for low, high in values[winners]:
        out = torch.full_like(low, IGNORE)
        out[window] = trinary_labels(low, high)[window]
        labels.append(out)
    return labels
