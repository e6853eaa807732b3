"""Views of one image → one score map per class, in 0..1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.imaging.planes import trinary_labels

__all__ = ["merge_views", "normalise", "trinary_labels"]

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
    if rule not in _PAIRS:
        raise ValueError(f"merge rule {rule!r}: allowed are {', '.join(_PAIRS)}")
    pair = _PAIRS[rule]
    total = torch.stack([pair(view, size) for view in views]).sum(dim=0)
    if rule == "mean":
        return total / sum(len(view) for view in views)
    return normalise(total, rule)


def normalise(total: Tensor, rule: Rule) -> Tensor:
    """Summed views f32[k,h,w] → 0..1 per class; a class without evidence stays 0."""
    if total.shape[0] == 0:
        return total
    high = total.amax(dim=(1, 2), keepdim=True)
    if rule == "irn":
        return total / (high + 1e-5)
    low = total.amin(dim=(1, 2), keepdim=True)
    if rule == "afa":
        return (total - low) / (high - low + 1e-5)
    return (total - low) / (high - low + 1e-8)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """f32[v,k,gh,gw] → f32[v,k,*size], bilinear (align_corners False); k may be 0, which torch itself refuses."""
    if maps.shape[1] == 0:
        return maps.new_zeros(maps.shape[0], 0, *size)
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _irn(view: Tensor, size: tuple[int, int]) -> Tensor:
    view = view.relu()
    both = view[:1] if len(view) == 1 else view[:1] + view[1:].flip(-1)
    return resized(both, size)[0]


def _afa(view: Tensor, size: tuple[int, int]) -> Tensor:
    view = resized(view, size)
    best = view[0] if len(view) == 1 else torch.maximum(view[0], view[1].flip(-1))
    return best.relu()


def _sum(view: Tensor, size: tuple[int, int]) -> Tensor:
    view = resized(view, size)
    return view[0] if len(view) == 1 else view[0] + view[1].flip(-1)


_PAIRS = {"irn": _irn, "afa": _afa, "weaktr": _sum, "mean": _sum}
