"""Class maps → one logit per class and image."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Pool = Literal["gap", "gmp", "topk"]
UNSEEN = -1e4  # stands for padding in a maximum; finite in half precision too


def pooled(maps: Tensor, seen: Tensor | None, *, pool: Pool, topk_share: float) -> Tensor:
    """f32[b,c,gh,gw] → f32[b,c] over the cells where seen bool[b,gh,gw] holds (all if None).

    gap: mean of all cells; gmp: maximum; topk: mean of the highest topk_share of the cells, at least of one.
    """
    flat = maps.flatten(2)
    if pool == "gap":
        if seen is None:
            return flat.mean(dim=2)
        weight = seen.flatten(1)[:, None].to(flat.dtype)
        return (flat * weight).sum(dim=2) / weight.sum(dim=2).clamp(min=1)
    if seen is not None:
        flat = flat.masked_fill(~seen.flatten(1)[:, None], UNSEEN)
    if pool == "gmp":
        return flat.amax(dim=2)
    count = max(1, round(topk_share * flat.shape[2]))
    best = flat.topk(count, dim=2).values
    real = best > UNSEEN / 2  # a crop with much padding may have fewer cells than count
    return (best * real).sum(dim=2) / real.sum(dim=2).clamp(min=1)
