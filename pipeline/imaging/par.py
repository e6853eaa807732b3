"""Pixel-adaptive refinement: planes drift towards neighbours of like colour (AFA, section 2). No learned weights, no ground truth.

Shape letters: b images, k planes, h w pixels, n = 8 * len(dilations) neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.core.config import AboveZero, Positive

AROUND = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
SMALLEST = 1e-8
TILE = 512  # px: larger images are refined in squares, each with a rim as wide as colours can travel


@dataclass(frozen=True)
class ParSettings:
    """scale        the image is refined at this share of its size, and the planes enlarged again (AFA: 0.5)
    dilations    px at that size: distances of the neighbours
    iterations   AFA: 10 on VOC, 15 on COCO
    w1, w2       width of the colour term, weight of the distance term
    """

    scale: Annotated[float, Field(ge=0.1, le=1)]
    dilations: tuple[Positive, ...]
    iterations: Positive
    w1: AboveZero
    w2: AboveZero

    def __post_init__(self) -> None:
        if not self.dilations:
            raise ValueError("dilations: got [], allowed is at least one distance in px")

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) px at which an image of `size` is refined."""
        return max(1, int(size[0] * self.scale)), max(1, int(size[1] * self.scale))


def refine_image(image: np.ndarray, planes: Tensor, settings: ParSettings) -> Tensor:
    """u8[h,w,3] and f32[k,gh,gw] → f32[k,h,w], refined at settings.scale."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255
    return refine_pixels(pixels, planes, settings)


def refine_pixels(pixels: Tensor, planes: Tensor, settings: ParSettings) -> Tensor:
    """f32[3,h,w] in 0..1 and f32[k,gh,gw] → f32[k,h,w], refined at settings.scale."""
    h, w = pixels.shape[-2:]
    small = F.interpolate(pixels[None], settings.size((h, w)), mode="bilinear", align_corners=False)
    refined = pixel_adaptive_refine(
        small, planes[None], dilations=settings.dilations, iterations=settings.iterations, w1=settings.w1, w2=settings.w2
    )
    return F.interpolate(refined, (h, w), mode="bilinear", align_corners=False)[0]


@torch.no_grad()
def pixel_adaptive_refine(
    images: Tensor,
    planes: Tensor,
    *,
    dilations: Sequence[int],
    iterations: int,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """images f32[b,3,h,w] in 0..1, planes f32[b,k,gh,gw] → f32[b,k,h,w].

    Planes are brought to the images' size (bilinear, align_corners True). Each iteration replaces a pixel by the weighted sum of 8
    neighbours at each dilation (px), borders replicated: softmax over the neighbours of -(colour difference / their deviation / w1)²,
    plus w2 times the same of their distances. Weights sum to 1 + w2. They depend on the image alone: any number of planes, for
    instance those of several background levels, share them in one call.
    """
    h, w = images.shape[-2:]
    if planes.shape[-2:] != (h, w):
        planes = F.interpolate(planes, (h, w), mode="bilinear", align_corners=True)
    rim = max(dilations) * iterations
    out = torch.empty_like(planes)
    for image, given, result in zip(images, planes, out, strict=True):
        for inner, outer, kept in _tiles(h, w, rim):
            weights = _weights(image[(slice(None), *outer)], dilations, w1, w2)
            refined = _iterate(given[(slice(None), *outer)], weights, dilations, iterations)
            result[(slice(None), *inner)] = refined[(slice(None), *kept)]
    return out


Window = tuple[slice, slice]


def _tiles(h: int, w: int, rim: int) -> Iterator[tuple[Window, Window, Window]]:
    """(where a tile's result goes, the same with its rim, the result inside the rim), px. One tile where the image is small."""
    if h <= TILE + 2 * rim and w <= TILE + 2 * rim:
        whole = slice(0, h), slice(0, w)
        yield whole, whole, whole
        return
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            inner = slice(top, min(top + TILE, h)), slice(left, min(left + TILE, w))
            outer = tuple(
                slice(max(0, s.start - rim), min(full, s.stop + rim)) for s, full in zip(inner, (h, w), strict=True)
            )
            kept = tuple(slice(s.start - o.start, s.stop - o.start) for s, o in zip(inner, outer, strict=True))
            yield inner, (outer[0], outer[1]), (kept[0], kept[1])


def _shifts(dilations: Sequence[int]) -> list[tuple[int, int]]:
    return [(dy * d, dx * d) for d in dilations for dy, dx in AROUND]


def _neighbours(planes: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """f32[c,h,w] → each neighbour in turn as a view f32[c,h,w]."""
    most, (h, w) = max(dilations), planes.shape[-2:]
    padded = F.pad(planes[None], (most, most, most, most), mode="replicate")[0]
    for dy, dx in _shifts(dilations):
        yield padded[:, most + dy : most + dy + h, most + dx : most + dx + w]


def _weights(image: Tensor, dilations: Sequence[int], w1: float, w2: float) -> Tensor:
    """f32[3,h,w] → f32[n,h,w]. Differences are made anew for each of three passes: 3n planes never stand side by side."""
    count = 8 * len(dilations)
    mean = torch.zeros_like(image)
    for neighbour in _neighbours(image, dilations):
        mean += neighbour
    mean /= count
    variance = torch.zeros_like(image)
    for neighbour in _neighbours(image, dilations):
        variance += (neighbour - mean).square_()
    deviation = (variance / (count - 1)).sqrt_()
    scale = (1 / (deviation + SMALLEST) / w1).square_() / len(image)
    logits = image.new_empty(count, *image.shape[1:])
    for logit, neighbour in zip(logits, _neighbours(image, dilations), strict=True):
        torch.sum((neighbour - image).square_().mul_(scale), dim=0, out=logit)
    weights = torch.softmax(logits.neg_(), dim=0)
    distances = torch.tensor([math.hypot(dy, dx) for dy, dx in _shifts(dilations)], device=image.device)
    near = torch.softmax(-((distances / (distances.std() + SMALLEST) / w1) ** 2), dim=0)
    return weights.add_(w2 * near[:, None, None])


def _iterate(planes: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    for _ in range(iterations):
        total = torch.zeros_like(planes)
        for weight, neighbour in zip(weights, _neighbours(planes, dilations), strict=True):
            total.addcmul_(neighbour, weight)
        planes = total
    return planes
