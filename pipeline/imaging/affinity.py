"""Pairwise affinities of grid cells: spreading planes along them, and learning them from label maps (AFA, section 3).

Shape letters: b images, k planes, gh gw cells of the grid, n = gh * gw; cell (y, x) has number y * gw + x.
Cells are near when they are at most `radius` cells apart both vertically and horizontally.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.labels import IGNORE


def propagate(planes: Tensor, affinity: Tensor, *, radius: int, power: float, eps: float) -> Tensor:
    """planes f32[b,k,gh,gw], affinity f32[b,n,n] ≥ 0 → f32[b,k,gh,gw], one step (AFA section 3, step 4).

    The affinity of cells that are not near is taken as 0, the rest is raised to `power`, and each column divided by its sum + eps;
    then planes @ affinity. Only the rows of the grid that are near each other are ever touched. ValueError if the shapes disagree.
    """
    b, k, gh, gw = planes.shape
    if affinity.shape != (b, gh * gw, gh * gw):
        raise ValueError(
            f"affinity {tuple(affinity.shape)} does not fit planes {tuple(planes.shape)}: allowed is n = {gh * gw}"
        )
    near = _near(gw, radius, planes.device).to(affinity.dtype)  # [gw,gw]
    out = torch.empty_like(planes)
    for y in range(gh):
        top, bottom = max(0, y - radius), min(gh, y + radius + 1)
        block = affinity[:, top * gw : bottom * gw, y * gw : (y + 1) * gw].view(b, bottom - top, gw, gw)
        weights = (block.pow(power) * near).view(b, -1, gw)
        out[:, :, y] = planes[:, :, top:bottom].reshape(b, k, -1) @ weights / (weights.sum(dim=1, keepdim=True) + eps)
    return out


def affinity_labels(labels: Tensor, *, radius: int, ignore: int = IGNORE) -> Tensor:
    """u8[b,gh,gw] labels → u8[b,n,n]: 1 same label, 0 different, `ignore` where either is ignored or the cells are not near."""
    b, gh, gw = labels.shape
    flat = labels.reshape(b, -1)
    rows, columns = _near(gh, radius, labels.device), _near(gw, radius, labels.device)
    near = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(gh * gw, gh * gw)
    known = flat != ignore
    same = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)
    return same.masked_fill_(~(near & known[:, :, None] & known[:, None, :]), ignore)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """affinity f32[b,n,n] in 0..1, labels u8[b,n,n] of affinity_labels → half the mean distance from 1 over same pairs plus half the
    mean over different pairs, each with one more pair in the denominator, so that no kind may be missing (AFA section 3)."""
    same, different = labels == 1, labels == 0
    return 0.5 * ((1 - affinity) * same).sum() / (same.sum() + 1) + 0.5 * (affinity * different).sum() / (
        different.sum() + 1
    )


def _near(length: int, radius: int, device: torch.device) -> Tensor:
    """bool[length,length]."""
    at = torch.arange(length, device=device)
    return (at[:, None] - at).abs() <= radius
