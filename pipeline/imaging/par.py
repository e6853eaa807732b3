"""Pixel-adaptive refinement: each pixel becomes the mean of neighbours weighted by similar colour (AFA, section 2).

Shape letters: b images, k planes, h w pixels, n = 8 * len(dilations) neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipeline.core.config import AboveZero, Positive

NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
SMALLEST = 1e-8  # added to standard deviations
TILE = 512  # px: larger images are refined in squares, each with a margin as wide as values can spread
STACKED = 1 << 27  # values of neighbours that a GPU holds at a time, 512 MiB


@dataclass(frozen=True)
class ParSettings:
    """scale        sides of the image that is refined over those of the original; the planes are enlarged again (AFA: 0.5)
    dilations    px at that size: distances of the neighbours
    iterations   AFA: 10 on VOC, 15 on COCO
    w1           width of the colour kernel, in standard deviations of the neighbours' colours
    w2           weight of the distance kernel against the colour kernel
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
    """Image u8[h,w,3] and planes f32[k,gh,gw] → f32[k,h,w], refined at settings.scale."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255
    return refine_pixels(pixels, planes, settings)


def refine_pixels(pixels: Tensor, planes: Tensor, settings: ParSettings) -> Tensor:
    """Image f32[3,h,w] in 0..1 and planes f32[k,gh,gw] → f32[k,h,w], refined at settings.scale."""
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

    Planes are brought to the images' size (bilinear, align_corners True). Each iteration replaces a pixel by the weighted
    sum of 8 neighbours at each dilation (px), borders replicated. Weights are the softmax over the neighbours of -(d/σ/w1)²,
    d being the colour difference and σ the standard deviation of the neighbours' colours, averaged over channels, plus
    w2 times the same of their distances; they sum to 1 + w2. They depend on the image alone: planes of several thresholds
    share them in one call.
    """
    h, w = images.shape[-2:]
    if planes.shape[-2:] != (h, w):
        planes = F.interpolate(planes, (h, w), mode="bilinear", align_corners=True)
    margin = max(dilations) * iterations
    out = torch.empty_like(planes)
    for image, image_planes, result in zip(images, planes, out, strict=True):
        for tile, padded_tile, inside in _tiles(h, w, margin):
            # neighbour by neighbour needs least memory, all of them at once an eighth of the kernels
            weigh, iterate = (_weights, _iterate) if image.device.type == "cpu" else (_weights_at_once, _iterate_at_once)
            weights = weigh(image[(slice(None), *padded_tile)], dilations, w1, w2)
            refined = iterate(image_planes[(slice(None), *padded_tile)], weights, dilations, iterations)
            result[(slice(None), *tile)] = refined[(slice(None), *inside)]
    return out


Window = tuple[slice, slice]


def _tiles(h: int, w: int, margin: int) -> Iterator[tuple[Window, Window, Window]]:
    """(tile in the image, tile with its margin in the image, tile inside its margin), px. A small image is one tile."""
    if h <= TILE + 2 * margin and w <= TILE + 2 * margin:
        whole = slice(0, h), slice(0, w)
        yield whole, whole, whole
        return
    for top in range(0, h, TILE):
        for left in range(0, w, TILE):
            tile = slice(top, min(top + TILE, h)), slice(left, min(left + TILE, w))
            padded = tuple(
                slice(max(0, s.start - margin), min(side, s.stop + margin)) for s, side in zip(tile, (h, w), strict=True)
            )
            inside = tuple(slice(s.start - p.start, s.stop - p.start) for s, p in zip(tile, padded, strict=True))
            yield tile, (padded[0], padded[1]), (inside[0], inside[1])


def _shifts(dilations: Sequence[int]) -> list[tuple[int, int]]:
    return [(dy * d, dx * d) for d in dilations for dy, dx in NEIGHBOURS]


def _neighbours(planes: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """f32[c,h,w] → for each of the n neighbours a view f32[c,h,w] of its values."""
    most, (h, w) = max(dilations), planes.shape[-2:]
    padded = F.pad(planes[None], (most, most, most, most), mode="replicate")[0]
    for dy, dx in _shifts(dilations):
        yield padded[:, most + dy : most + dy + h, most + dx : most + dx + w]


def _weights(image: Tensor, dilations: Sequence[int], w1: float, w2: float) -> Tensor:
    """f32[3,h,w] → f32[n,h,w]. Three passes compute the differences anew, so that 3n planes are never held at once."""
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
    return weights.add_(w2 * _distance_kernel(tuple(dilations), w1, image.device)[:, None, None])


def _weights_at_once(image: Tensor, dilations: Sequence[int], w1: float, w2: float) -> Tensor:
    """_weights for a GPU."""
    neighbours = torch.stack(list(_neighbours(image, dilations)))
    scale = (neighbours.std(dim=0) + SMALLEST).mul_(w1).square_().reciprocal_() / len(image)
    logits = (neighbours.sub_(image).square_().mul_(scale)).sum(dim=1)
    weights = torch.softmax(logits.neg_(), dim=0)
    return weights.add_(w2 * _distance_kernel(tuple(dilations), w1, image.device)[:, None, None])


@lru_cache(maxsize=16)
def _distance_kernel(dilations: tuple[int, ...], w1: float, device: torch.device) -> Tensor:
    """f32[n], uploaded once for all images."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        distances = torch.tensor([math.hypot(dy, dx) for dy, dx in _shifts(dilations)], device=device)
        return torch.softmax(-((distances / (distances.std() + SMALLEST) / w1) ** 2), dim=0)


def _iterate(planes: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    for _ in range(iterations):
        total = torch.zeros_like(planes)
        for weight, neighbour in zip(weights, _neighbours(planes, dilations), strict=True):
            total.addcmul_(neighbour, weight)
        planes = total
    return planes


def _iterate_at_once(planes: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """_iterate for a GPU, some planes at a time."""
    refined = []
    for part in planes.split(max(1, STACKED // weights.numel())):
        for _ in range(iterations):
            part = torch.stack(list(_neighbours(part, dilations))).mul_(weights[:, None]).sum(dim=0)
        refined.append(part)
    return torch.cat(refined)
