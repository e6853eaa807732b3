"""Score maps → soft masks; images and masks → masked images. Pure tensor functions.

Shape letters: b images, p pairs of an image and a class, h w pixels, gh gw cells of a score-map grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Contrast = Literal["absolute", "relative"]
# the lowest maximum that relative contrast divides by: the gradient of an all-zero map would have no bound
LOWEST_MAXIMUM = 1e-4


def soft_masks(scores: Tensor, size: tuple[int, int], *, eps: float, contrast: Contrast) -> Tensor:
    """f32[p,gh,gw] >= 0 → f32[p,h,w] in 0..1: upsampled to `size` (align_corners), then (x - min) / (max - min + eps) per
    map.

    absolute: eps is in units of the scores, so that the mask of a map of low contrast stays low everywhere (SemPLeS section
    3); relative: eps is a fraction of the map's own maximum, without gradient to that, so that the mask does not depend on
    the scale of the scores. Gradient flows through min and max.
    """
    full = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=True)[:, 0]
    flat = full.flatten(1)  # min and max rather than amin and amax, which divide the gradient among equals
    low, high = flat.min(dim=1).values[:, None, None], flat.max(dim=1).values[:, None, None]
    floor = eps if contrast == "absolute" else eps * high.detach().clamp(min=LOWEST_MAXIMUM)
    return (full - low) / (high - low + floor)


def masked(images: Tensor, image_index: Tensor, masks: Tensor) -> Tensor:
    """Images f32[b,3,h,w], in which 0 is the mean colour; i64[p] the image of each pair; masks f32[p,h,w] → f32[p,3,h,w]."""
    return images[image_index] * masks[:, None]


def random_regions(count: int, size: tuple[int, int], cells: int, like: Tensor) -> Tensor:
    """f32[count,h,w] in 0..1: masks of smooth random shape with soft borders: upsampled noise above a random threshold.

    cells: of the grid along a side that the noise is drawn on. Draws from torch's global generator of like's device.
    """
    noise = torch.rand(count, 1, cells, cells, device=like.device)
    smooth = F.interpolate(noise, size, mode="bicubic", align_corners=True)[:, 0]
    threshold = torch.rand(count, 1, 1, device=like.device)
    return ((smooth - threshold) * (2 * cells)).sigmoid()


def visible_fraction(evidence: Tensor, visibility: Tensor) -> Tensor:
    """Evidence planes f32[b,·,h,w] >= 0, visibility f32[b,h,w] in 0..1 → f32[b,·] in 0..1: the fraction of each plane's sum
    that is visible; 0 for a plane without evidence."""
    total = evidence.sum(dim=(2, 3))
    return torch.einsum("bchw,bhw->bc", evidence, visibility) / total.clamp(min=1e-6)
