"""Losses of dense predictions that methods and segmenters share. Masks hold 0 background, i+1 class i, 255 ignore."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.labels import BACKGROUND, IGNORE


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits f32[b,c+1,h,w], mask values [b,h,w] → mean over the pixels that are not ignored; 0 where all are.

    CUDA's kernel that sums by itself (nll_loss2d) adds in no fixed order: there, pixels are summed apart.
    """
    counted = (labels != IGNORE).sum().clamp(min=1)
    reduction = "none" if logits.is_cuda else "sum"
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction=reduction).sum() / counted


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits f32[b,c+1,h,w], mask values [b,h,w] → half the mean over background pixels plus half the mean over foreground
    pixels (AFA section 3); 0 of either where it has no pixel."""
    pixel_losses = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background, foreground = labels == BACKGROUND, (labels != BACKGROUND) & (labels != IGNORE)
    means = [(pixel_losses * region).sum() / region.sum().clamp(min=1) for region in (background, foreground)]
    return 0.5 * means[0] + 0.5 * means[1]


def dense_energy(
    images: Tensor, probabilities: Tensor, valid: Tensor, *, cells: int, sigma_rgb: float, sigma_xy: float
) -> Tensor:
    """Dense CRF energy of a prediction (Tang et al. 2018; AFA's regularised loss), normalised to a mean in 0..1.

    images f32[b,3,h,w] in 0..1; probabilities f32[b,c+1,·,·]; valid bool[b,h,w]. Over all pairs of cells of a grid of at
    most `cells` × `cells`, E = Σ_ij w_ij (1 - p_i · p_j) / Σ_ij w_ij with a Gaussian kernel w of colours (sigma_rgb, colours
    in 0..1) and positions (sigma_xy, a fraction of the image's long side). A mean, so that its weight does not depend on the
    image's size.
    """
    h, w = images.shape[-2:]
    grid = min(h, max(1, round(cells * h / max(h, w)))), min(w, max(1, round(cells * w / max(h, w))))
    colours = F.adaptive_avg_pool2d(images, grid).flatten(2).transpose(1, 2)  # [b,n,3]
    inside = (F.adaptive_avg_pool2d(valid[:, None].float(), grid) > 0.5).flatten(2).float()  # [b,1,n]
    y = torch.arange(grid[0], device=images.device) / max(grid)
    x = torch.arange(grid[1], device=images.device) / max(grid)
    positions = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).view(-1, 2)
    distance = torch.cdist(colours, colours).square() / (2 * sigma_rgb**2)
    distance = distance + torch.cdist(positions, positions).square() / (2 * sigma_xy**2)
    weights = (-distance).exp() * inside * inside.transpose(1, 2)
    cell_probabilities = F.interpolate(probabilities, grid, mode="bilinear", align_corners=False).flatten(2)  # [b,c+1,n]
    disagreement = 1 - cell_probabilities.transpose(1, 2) @ cell_probabilities
    return (weights * disagreement).sum() / weights.sum().clamp(min=1e-6)
