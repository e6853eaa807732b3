"""Patch class scores → image scores: the mean of an adaptive number of patches (APC, docs/methods/apc.md).

Shape letters: b images, c classes, gh gw cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import Positive, Share

Rule = Literal["ratio", "gap", "fixed", "max"]
PADDED = -1.0  # score of padded patches, below every real one
SMALLEST = 1e-12  # score that a gap is divided by, at least


@dataclass(frozen=True)
class Pooling:
    """rule    number K <= k_max of patches whose scores are averaged, of a class's scores z1 >= z2 >= … in one image:
             ratio  those with z >= ratio * z1
             gap    up to the largest quotient z_i / z_(i+1)
             fixed  k_max (TKP-PCL);  max  one (ViT-PCM)
    ratio   fraction of the highest score; only rule ratio uses it
    k_max   patches; rule max ignores it
    """

    rule: Rule
    ratio: Share
    k_max: Positive


def adaptive_k_pooled(scores: Tensor, valid: Tensor | None, *, rule: Rule, ratio: float, k_max: int) -> Tensor:
    """f32[b,c,gh,gw] >= 0 → f32[b,c]: the mean of the K highest scores among the patches valid bool[b,gh,gw] (None: among
    all).

    K is chosen without gradient, which goes through the mean to exactly these K patches. 0 where no patch is valid.
    """
    highest, _ = _highest_scores(scores, valid, rule, k_max)
    chosen = _first_k(highest.detach(), rule, ratio).to(highest.dtype)
    return (highest * chosen).sum(dim=2) / chosen.sum(dim=2).clamp(min=1)


@torch.no_grad()
def chosen_patches(scores: Tensor, valid: Tensor | None, *, rule: Rule, ratio: float, k_max: int) -> Tensor:
    """f32[b,c,gh,gw] >= 0 → f32[b,c,gh,gw], 1 on the K patches that adaptive_k_pooled takes the mean of; their sum is K."""
    highest, indices = _highest_scores(scores, valid, rule, k_max)
    chosen = _first_k(highest, rule, ratio).to(scores.dtype)
    return torch.zeros_like(scores).flatten(2).scatter_(2, indices, chosen).view_as(scores)


def _highest_scores(scores: Tensor, valid: Tensor | None, rule: Rule, k_max: int) -> tuple[Tensor, Tensor]:
    """The highest scores [b,c,·] in descending order, as many as the rule reads, and their flat indices."""
    flat = scores.flatten(2)
    if valid is not None:
        flat = flat.masked_fill(~valid.flatten(1)[:, None], PADDED)
    count = {"max": 1, "gap": k_max + 1}.get(rule, k_max)
    return flat.topk(min(count, flat.shape[2]), dim=2)


def _first_k(highest: Tensor, rule: Rule, ratio: float) -> Tensor:
    """Scores [b,c,·] in descending order → bool of the same shape: True on the first K."""
    if rule == "ratio":
        return highest >= (ratio * highest[..., :1]).clamp(min=0)  # padding lies below 0
    real = highest >= 0
    if rule == "gap":
        quotients = highest[..., :-1] / highest[..., 1:].clamp(min=SMALLEST)
        quotients = F.pad(quotients * real[..., 1:], (0, 1))  # there is none before padding, nor after the last patch
        last = quotients.argmax(dim=2, keepdim=True)  # the first of equal ones
        return real & (torch.arange(highest.shape[2], device=highest.device) <= last)
    return real
