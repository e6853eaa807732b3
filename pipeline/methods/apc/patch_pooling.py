"""Patch class scores → image scores over an adaptive number of patches; patch embeddings → a contrast loss (APC, docs/methods/apc.md).

Shape letters: b images, c classes, d channels of an embedding, gh gw cells, n = gh * gw, k most classes that one image has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import Positive, Share

Rule = Literal["ratio", "gap", "fixed", "max"]
UNSEEN = -1.0  # stands for padding among scores, which are never negative
TINY = 1e-12  # the smallest score that a gap is measured against


@dataclass(frozen=True)
class Pooling:
    """rule    how many patches K <= k_max speak for a class, along its scores z1 >= z2 >= … of one image:
             ratio  those with z >= ratio * z1
             gap    up to the largest step z_i / z_(i+1)
             fixed  k_max (TKP-PCL);  max  one (ViT-PCM)
    ratio   only rule ratio uses it
    k_max   patches; rule max ignores it
    """

    rule: Rule
    ratio: Share
    k_max: Positive


def adaptive_k_pooled(scores: Tensor, seen: Tensor | None, *, rule: Rule, ratio: float, k_max: int) -> Tensor:
    """f32[b,c,gh,gw] >= 0 → f32[b,c]: the mean of the K highest scores where seen bool[b,gh,gw] holds (all if None).

    K is chosen without gradient, which goes through the mean to exactly these K patches. 0 where no patch is seen.
    """
    best, _ = _best(scores, seen, rule, k_max)
    chosen = _chosen(best.detach(), rule, ratio).to(best.dtype)
    return (best * chosen).sum(dim=2) / chosen.sum(dim=2).clamp(min=1)


@torch.no_grad()
def chosen_patches(scores: Tensor, seen: Tensor | None, *, rule: Rule, ratio: float, k_max: int) -> Tensor:
    """f32[b,c,gh,gw] >= 0 → f32[b,c,gh,gw], 1 on the K patches that adaptive_k_pooled takes the mean of; their sum is K."""
    best, places = _best(scores, seen, rule, k_max)
    chosen = _chosen(best, rule, ratio).to(scores.dtype)
    return torch.zeros_like(scores).flatten(2).scatter_(2, places, chosen).view_as(scores)


def _best(scores: Tensor, seen: Tensor | None, rule: Rule, k_max: int) -> tuple[Tensor, Tensor]:
    """The highest scores [b,c,·], highest first, as many as the rule looks at, and where they lie."""
    flat = scores.flatten(2)
    if seen is not None:
        flat = flat.masked_fill(~seen.flatten(1)[:, None], UNSEEN)
    wanted = {"max": 1, "gap": k_max + 1}.get(rule, k_max)
    return flat.topk(min(wanted, flat.shape[2]), dim=2)


def _chosen(best: Tensor, rule: Rule, ratio: float) -> Tensor:
    """Scores [b,c,·], highest first → bool of the same shape: the first K."""
    if rule == "ratio":
        return best >= (ratio * best[..., :1]).clamp(min=0)  # padding lies below 0
    real = best >= 0
    if rule == "gap":
        steps = best[..., :-1] / best[..., 1:].clamp(min=TINY)
        steps = F.pad(steps * real[..., 1:], (0, 1))  # before padding, or after the last patch, there is no step
        last = steps.argmax(dim=2, keepdim=True)  # the first of equal ones
        return real & (torch.arange(best.shape[2], device=best.device) <= last)
    return real


def patch_contrast(
    features: Tensor, scores: Tensor, tags: Tensor, seen: Tensor | None, *, high: float, low: float
) -> Tensor:
    """Embeddings f32[b,d,gh,gw], class scores f32[b,c,gh,gw], tags f32[b,c] 0 or 1, seen bool[b,gh,gw] → a scalar in 0..2.

    For each image and each class of its tags, with H the patches that score above high, L those below low, and
    s = (1 + cos) / 2 of two embeddings: mean of 1 - s over the pairs within H plus mean of s over the pairs of H and L. Classes
    whose H or L is empty do not count; without any that counts the loss is 0. One patch in H makes no pair: its first mean is 0.

    O(n * d) for each class: a sum of cosines over pairs is a product of sums of unit vectors,
    Σ_(i≠j in H) cos = |Σ_H u|² - Σ_H |u|² and Σ_(i in H, j in L) cos = Σ_H u · Σ_L u.
    """
    most = int(tags.sum(dim=1).max())
    present, classes = tags.topk(most, dim=1)  # [b,k]: the classes of each image come first
    vectors = features.flatten(2).float()
    squares = vectors.square().sum(dim=1, keepdim=True)  # [b,1,n]
    directed = squares.detach() > 0  # a patch of zeros is like no other: its unit vector is 0, too
    found = scores.detach().flatten(2)
    found = found.gather(1, classes[..., None].expand(-1, -1, found.shape[2]))
    counted = present[..., None] > 0
    if seen is not None:
        counted = counted & seen.flatten(1)[:, None]
    members = torch.cat([(found > high) & counted, (found < low) & counted], dim=1).to(vectors.dtype)  # [b,2k,n]
    shares = members * directed * squares.masked_fill(~directed, 1).rsqrt()  # unit vectors of all patches are never made
    sure, unsure = (vectors @ shares.transpose(1, 2)).float().chunk(2, dim=2)  # Σ_H u and Σ_L u, [b,d,k] each
    sure_count, unsure_count = members.sum(dim=2).chunk(2, dim=1)
    alone = (members[:, :most] * directed).sum(dim=2)
    pairs = sure_count * (sure_count - 1)
    within = (sure.square().sum(dim=1) - alone) / pairs.clamp(min=1)
    across = (sure * unsure).sum(dim=1) / (sure_count * unsure_count).clamp(min=1)
    usable = (sure_count > 0) & (unsure_count > 0)
    terms = (pairs > 0) * (1 - within) / 2 + (1 + across) / 2
    return (terms * usable).sum() / usable.sum().clamp(min=1)
