"""Views of one image → one score map per class, in 0..1, and how well the views agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.imaging.planes import trinary_labels

__all__ = ["merge_views", "normalise", "trinary_labels", "view_agreement"]

Rule = Literal["irn", "afa", "weaktr", "mean"]


def merge_views(views: Sequence[Tensor], *, rule: Rule, size: tuple[int, int]) -> Tensor:
    """Views of one image at several scales → f32[k,*size] in 0..1.

    views: one f32[1 or 2,k,gh,gw] per scale; row 0 is the image's map, row 1 that of its mirror image, not mirrored back.
    size: (h, w) of the result. Rules, from the authors' code:
      irn     ReLU, view + mirrored view, bilinear to size, summed over scales, divided by the spatial maximum + 1e-5 (IRN)
      afa     bilinear to size, maximum of the two, ReLU, summed, minus the spatial minimum, divided by maximum + 1e-5 (AFA)
      weaktr  bilinear to size, summed over views and scales, (x - min) / (max - min + 1e-8) (WeakTr)
      mean    bilinear to size, mean over views and scales, as it is: for probabilities
    """
    merge_pair = _merge_pair(rule)
    total = torch.stack([merge_pair(view, size) for view in views]).sum(dim=0)
    if rule == "mean":
        return total / sum(len(view) for view in views)
    return normalise(total, rule)


def view_agreement(views: Sequence[Tensor], *, rule: Rule, size: tuple[int, int]) -> Tensor:
    """views, rule and size as of merge_views → f32[k] in 0..1: mean soft IoU of all pairs of views, per class.

    Each view is normalised alone by the same rule: mirrored back, of `size` and in 0..1. The soft IoU of two views on a
    class is the sum over cells of the smaller score divided by that of the larger one. Views of any scale, mirrored or not,
    are paired. NaN where there is only one view. 0 for two views of which at least one has no positive score of the class:
    absent evidence is not agreement.
    """
    merge_pair = _merge_pair(rule)
    maps = torch.stack([merge_pair(view_map[None], size) for view in views for view_map in upright(view)])
    if rule != "mean":
        maps = normalise(maps, rule)
    count, classes = maps.shape[:2]
    if count == 1:
        return maps.new_full((classes,), float("nan"))
    mass = maps.sum(dim=(-2, -1))  # [v,k]
    total = maps.new_zeros(classes)
    for index in range(count - 1):  # each view with all later ones: no more memory than the views themselves
        intersection = torch.minimum(maps[index], maps[index + 1 :]).sum(dim=(-2, -1))
        union = mass[index] + mass[index + 1 :] - intersection
        total += torch.where(union > 0, intersection / union, 0.0).clamp(0.0, 1.0).sum(dim=0)
    return (total * (2 / (count * (count - 1)))).clamp(0.0, 1.0)


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
    """f32[1 or 2,k,h,w], row 1 of the mirror image → f32[k,h,w] of each row, row 1 mirrored back."""
    return [view[0]] if len(view) == 1 else [view[0], view[1].flip(-1)]


def _irn(view: Tensor, size: tuple[int, int]) -> Tensor:
    return resized(reduce(torch.add, upright(view.relu()))[None], size)[0]


def _afa(view: Tensor, size: tuple[int, int]) -> Tensor:
    return reduce(torch.maximum, upright(resized(view, size))).relu()


def _sum(view: Tensor, size: tuple[int, int]) -> Tensor:
    return reduce(torch.add, upright(resized(view, size)))


_PAIR_RULES = {"irn": _irn, "afa": _afa, "weaktr": _sum, "mean": _sum}


def _merge_pair(rule: Rule) -> Callable[[Tensor, tuple[int, int]], Tensor]:
    if rule not in _PAIR_RULES:
        raise ValueError(f"merge rule {rule!r}: allowed are {', '.join(_PAIR_RULES)}")
    return _PAIR_RULES[rule]
