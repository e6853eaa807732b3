"""Views of one image → one score map per class, in 0..1, and how well the views agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.imaging.planes import trinary_labels

__all__ = ["agreement_of_views", "merge_views", "normalise", "trinary_labels"]

Rule = Literal["irn", "afa", "weaktr", "mean"]


def merge_views(views: Sequence[Tensor], *, rule: Rule, size: tuple[int, int]) -> Tensor:
    """Views of one image at several scales → f32[k,*size] in 0..1.

    views: one f32[1 or 2,k,gh,gw] per scale; row 0 sees the image, row 1 its mirror image (not mirrored back yet).
    size: (h, w) of the result. Rules, from the authors' programs:
      irn     ReLU, view + mirrored view, bilinear to size, summed over scales, divided by the spatial maximum + 1e-5 (IRN)
      afa     bilinear to size, maximum of the two, ReLU, summed, minus the spatial minimum, divided by maximum + 1e-5 (AFA)
      weaktr  bilinear to size, summed over views and scales, (x - min) / (max - min + 1e-8) (WeakTr)
      mean    bilinear to size, mean over views and scales, as it is: for probabilities
    """
    pair = _pair(rule)
    total = torch.stack([pair(view, size) for view in views]).sum(dim=0)
    if rule == "mean":
        return total / sum(len(view) for view in views)
    return normalise(total, rule)


def agreement_of_views(views: Sequence[Tensor], *, rule: Rule, size: tuple[int, int]) -> Tensor:
    """views, rule and size as of merge_views → f32[k] in 0..1: how well the views agree on each class.

    Each view is merged by itself, so it is upright, of `size` and in 0..1 as the merged map is. Two views' soft IoU on a class is the
    sum over cells of the smaller scores over that of the larger ones; the mean of all pairs of views, of any scale and mirrored or
    not, is told. NaN where there is one view only: nothing is compared. Two views without any evidence for a class agree by 0 on it,
    as views do of which one has none: a kept class that nothing speaks for must not look sure.
    """
    pair = _pair(rule)
    alone = torch.stack([pair(one[None], size) for view in views for one in upright(view)])
    if rule != "mean":
        alone = normalise(alone, rule)
    count, classes = alone.shape[:2]
    if count == 1:
        return alone.new_full((classes,), float("nan"))
    mass = alone.sum(dim=(-2, -1))  # [v,k]
    found = alone.new_zeros(classes)
    for at in range(count - 1):  # one view against all later ones: no more memory than the views themselves
        both = torch.minimum(alone[at], alone[at + 1 :]).sum(dim=(-2, -1))
        either = mass[at] + mass[at + 1 :] - both
        found += torch.where(either > 0, both / either, 0.0).clamp(0.0, 1.0).sum(dim=0)
    return (found * (2 / (count * (count - 1)))).clamp(0.0, 1.0)


def normalise(total: Tensor, rule: Rule) -> Tensor:
    """Summed views f32[...,k,h,w] → 0..1 per class; a class without evidence stays 0."""
    if total.shape[-3] == 0:
        return total
    high = total.amax(dim=(-2, -1), keepdim=True)
    if rule == "irn":
        return total / (high + 1e-5)
    low = total.amin(dim=(-2, -1), keepdim=True)
    if rule == "afa":
        return (total - low) / (high - low + 1e-5)
    return (total - low) / (high - low + 1e-8)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """f32[v,k,gh,gw] → f32[v,k,*size], bilinear (align_corners False); k may be 0, which torch itself refuses."""
    if maps.shape[1] == 0:
        return maps.new_zeros(maps.shape[0], 0, *size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def upright(view: Tensor) -> list[Tensor]:
    """f32[1 or 2,k,h,w], row 1 of which sees the mirror image → f32[k,h,w] of each row as the image lies."""
    return [view[0]] if len(view) == 1 else [view[0], view[1].flip(-1)]


def _irn(view: Tensor, size: tuple[int, int]) -> Tensor:
    return resized(reduce(torch.add, upright(view.relu()))[None], size)[0]


def _afa(view: Tensor, size: tuple[int, int]) -> Tensor:
    return reduce(torch.maximum, upright(resized(view, size))).relu()


def _sum(view: Tensor, size: tuple[int, int]) -> Tensor:
    return reduce(torch.add, upright(resized(view, size)))


_PAIRS = {"irn": _irn, "afa": _afa, "weaktr": _sum, "mean": _sum}


def _pair(rule: Rule) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    if rule not in _PAIRS:
        raise ValueError(f"merge rule {rule!r}: allowed are {', '.join(_PAIRS)}")
    return _PAIRS[rule]
