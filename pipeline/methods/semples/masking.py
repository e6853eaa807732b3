"""Score maps → soft masks; images and masks → masked images. Pure tensor functions.

Shape letters: b images, p pairs of an image and a class, h w pixels, gh gw cells of a score-map grid.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Contrast = Literal["absolute", "relative"]
# maps with a lower maximum stay faint in relative contrast, too: an empty one would have a gradient without bounds
FAINT = 1e-4


def soft_masks(scores: Tensor, size: tuple[int, int], *, eps: float, contrast: Contrast) -> Tensor:
    """f32[p,gh,gw] >= 0 → f32[p,h,w] in 0..1: upsampled (align_corners), then (x - min) / (max - min + eps) per map.

    absolute: eps is in units of the scores, so that a map of low contrast stays faint (SemPLeS section 3); relative: of the map's own
    maximum, without gradient to that, so that the scale of the scores does not matter. Gradient flows through min and max.
    """
    full = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=True)[:, 0]
    flat = full.flatten(1)  # min and max rather than amin and amax, which share the gradient out among equals
    low, high = flat.min(dim=1).values[:, None, None], flat.max(dim=1).values[:, None, None]
    floor = eps if contrast == "absolute" else eps * high.detach().clamp(min=FAINT)
    return (full - low) / (high - low + floor)


def masked(images: Tensor, of: Tensor, masks: Tensor) -> Tensor:
    """Images f32[b,3,h,w] in a range whose 0 stands for nothing, image number of each pair i64[p], masks f32[p,h,w] → f32[p,3,h,w]."""
    return images[of] * masks[:, None]


def blobs(count: int, size: tuple[int, int], cells: int, like: Tensor) -> Tensor:
    """f32[count,h,w] in 0..1: smooth random regions with soft borders, each of a random share of the image.

    cells: of the grid along a side that the noise is drawn on. Draws from torch's global generator of like's device.
    """
    noise = torch.rand(count, 1, cells, cells, device=like.device)
    smooth = F.interpolate(noise, size, mode="bicubic", align_corners=True)[:, 0]
    level = torch.rand(count, 1, 1, device=like.device)
    return ((smooth - level) * (2 * cells)).sigmoid()


def visible_share(evidence: Tensor, seen: Tensor) -> Tensor:
    """How much of the evidence f32[b,·,h,w] lies where seen f32[b,h,w] in 0..1 is high → f32[b,·] in 0..1; 0 where there is none."""
    total = evidence.sum(dim=(2, 3))
    return torch.einsum("bchw,bhw->bc", evidence, seen) / total.clamp(min=1e-6)
