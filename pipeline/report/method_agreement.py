"""Small masks of the runs → agreement between methods: mean IoU of their masks, per image and per pair of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from pipeline.core.labels import IGNORE


def mask_agreement(mask: np.ndarray, other: np.ndarray) -> float:
    """Two masks u8[h,w] → mean IoU between them over the classes in either, background included.

    Pixels that are 255 in either are left out; NaN where no pixel is left.
    """
    valid = (mask != IGNORE) & (other != IGNORE)
    a, b = mask[valid], other[valid]
    sizes = np.bincount(a, minlength=256) + np.bincount(b, minlength=256)
    intersections = np.bincount(a[a == b], minlength=256)
    present = sizes > 0
    return float((intersections[present] / (sizes - intersections)[present]).mean()) if present.any() else math.nan


def agreement_matrix(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Masks of an image by run, None where a run lacks it → f64[m,m] of `mask_agreement`; NaN where either is missing."""
    matrix = np.full((len(masks), len(masks)), math.nan)
    for at, mask in enumerate(masks):
        if mask is not None:
            matrix[at, at] = 1.0
    for a, b in combinations(range(len(masks)), 2):
        mask, other = masks[a], masks[b]
        if mask is not None and other is not None:
            matrix[a, b] = matrix[b, a] = mask_agreement(mask, other)
    return matrix


def mean_agreement(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f64[m,m] of `agreement_matrix` → f64[m], mean over the other runs, NaN if there are none; i64[m], their number."""
    off_diagonal = matrix.copy()
    np.fill_diagonal(off_diagonal, math.nan)
    known = ~np.isnan(off_diagonal)
    counts = known.sum(axis=1)
    sums = np.where(known, off_diagonal, 0).sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(matrix), math.nan), where=counts > 0), counts


class Agreement:
    """Sums over images of the agreement between the last masks of runs, one image after another.

    methods: names of the runs, in the order of the matrices.
    """

    def __init__(self, methods: Sequence[str]) -> None:
        self.methods = methods
        self._shape = (len(methods), len(methods))
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, image_id: str, split: str, masks: Mapping[str, np.ndarray]) -> dict[str, tuple[float, int]]:
        """Masks u8[h,w] of an image by run → run → (mean agreement with the other runs that have it, how many these are).

        Without runs that no other run can be compared with. ValueError if the masks differ in size.
        """
        _same_size(image_id, masks)
        matrix = agreement_matrix([masks.get(method) for method in self.methods])
        self._sums.setdefault(split, np.zeros(self._shape))
        self._counts.setdefault(split, np.zeros(self._shape, np.int64))
        self._sums[split] += np.nan_to_num(matrix)
        self._counts[split] += ~np.isnan(matrix)
        means = zip(self.methods, *mean_agreement(matrix), strict=True)
        return {method: (float(value), int(count)) for method, value, count in means if count}

    def pairs(self) -> dict[str, np.ndarray]:
        """Split → f64[m,m], mean over the images that both runs have; symmetric, 1 on the diagonal, NaN without such
        images."""
        return {
            split: np.divide(self._sums[split], count, out=np.full(self._shape, math.nan), where=count > 0)
            for split, count in sorted(self._counts.items())
            if count.any()
        }


def _same_size(image_id: str, masks: Mapping[str, np.ndarray]) -> None:
    sizes = {method: mask.shape for method, mask in masks.items()}
    if len(set(sizes.values())) > 1:
        by_method = ", ".join(f"{height}×{width} in {method}.h5" for method, (height, width) in sizes.items())
        raise ValueError(f"the mask of {image_id!r} is {by_method}, so not of one photograph; run `dvc repro evaluate`")
