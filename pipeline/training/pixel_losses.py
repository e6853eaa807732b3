"""Losses of dense predictions that methods and segmenters share. Masks hold 0 background, i+1 class i, 255 ignore."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.labels import BACKGROUND, IGNORE


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits f32[b,c+1,h,w], mask values [b,h,w] → mean over the pixels that are not ignored; 0 where all are."""
    counted = (labels != IGNORE).sum().clamp(min=1)
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / counted


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """AFA section 3: half the mean over background pixels plus half the mean over foreground pixels; a kind that is missing adds 0."""
    pixel = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background, foreground = labels == BACKGROUND, (labels != BACKGROUND) & (labels != IGNORE)
    means = [(pixel * kind).sum() / kind.sum().clamp(min=1) for kind in (background, foreground)]
    return 0.5 * means[0] + 0.5 * means[1]


def dense_energy(images: Tensor, shares: Tensor, valid: Tensor, *, cells: int, sigma_rgb: float, sigma_xy: float) -> Tensor:
    """How likely two cells that look alike and lie near each other get different labels: a scalar in 0..1.

    images f32[b,3,h,w] in 0..1; shares f32[b,c+1,·,·], a softmax; valid bool[b,h,w]. All pairs of cells of a grid of at most
    `cells` × `cells` are compared: E = Σ_ij w_ij (1 - s_i · s_j) / Σ_ij w_ij with a Gaussian w of colours (sigma_rgb in 0..1) and
    places (sigma_xy, a share of the image's long side). It is the energy of Tang et al. 2018 (AFA's regularised loss), made a
    mean, so that its weight does not depend on the image's size.
    """
    h, w = images.shape[-2:]
    grid = min(h, max(1, round(cells * h / max(h, w)))), min(w, max(1, round(cells * w / max(h, w))))
    colours = F.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)  # [b,n,3]
    seen = (F.adaptive_avg_pool2d(valid[:, None].float(), grid) > 0.5).flatten(2).float()  # [b,1,n]
    y = torch.arange(grid[0], device=images.device) / max(grid)
    x = torch.arange(grid[1], device=images.device) / max(grid)
    places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)
    far = torch.cdist(colours, colours).square() / (2 * sigma_rgb**2) + torch.cdist(places, places).square() / (
        2 * sigma_xy**2
    )
    weights = (-far).exp() * seen * seen.transpose(1, 2)
    labels = F.interpolate(shares, grid, mode="bilinear", align_corners=False).flatten(2)  # [b,c+1,n]
    unlike = 1 - labels.transpose(1, 2) @ labels
    return (weights * unlike).sum() / weights.sum().clamp(min=1e-6)
