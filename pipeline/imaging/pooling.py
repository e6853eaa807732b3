"""Class maps → one logit per class and image; valid pixels → valid cells."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Pool = Literal["gap", "gmp", "topk"]
PADDED = -1e4  # score of padded cells, below every real one; finite in half precision too


def valid_cells(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool[b,h,w] of pixels, False on padding → bool[b,gh,gw] of cells: True where a cell has a valid pixel."""
    return F.adaptive_max_pool2d(valid[:, None].float(), grid)[:, 0] > 0


def pooled(maps: Tensor, valid: Tensor | None, *, pool: Pool, topk_share: float) -> Tensor:
    """Class maps f32[b,c,gh,gw] → logits f32[b,c], over the cells that valid bool[b,gh,gw] marks (None: over all).

    gap: mean (global average pooling); gmp: maximum (global max pooling); topk: mean of the highest cells, topk_share (0..1)
    of all cells of the grid, padding included, rounded, at least one. 0 for gap and topk where no cell is valid.
    """
    flat = maps.flatten(2)
    if pool == "gap":
        if valid is None:
            return flat.mean(dim=2)
        weight = valid.flatten(1)[:, None].to(flat.dtype)
        return (flat * weight).sum(dim=2) / weight.sum(dim=2).clamp(min=1)
    if valid is not None:
        flat = flat.masked_fill(~valid.flatten(1)[:, None], PADDED)
    if pool == "gmp":
        return flat.amax(dim=2)
    count = max(1, round(topk_share * flat.shape[2]))
    highest = flat.topk(count, dim=2).values
    real = highest > PADDED / 2  # a crop with much padding may have fewer cells than count
    return (highest * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)
