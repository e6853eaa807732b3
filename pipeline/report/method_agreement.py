"""Small masks of all runs → agreement between methods: mean IoU of their masks, per image and per pair of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from pipeline.core import store
from pipeline.core.labels import IGNORE
from pipeline.core.records import Records


@dataclass(frozen=True)
class Agreement:
    """Mean IoU between the last masks of two runs, 0..1.

    images  run → id → (mean over the other runs, how many these are); without images that no other run has
    pairs   split → f64[m,m], mean over the images that both runs have; symmetric, 1 on the diagonal, NaN without such images
    """

    images: Mapping[str, Mapping[str, tuple[float, int]]]
    pairs: Mapping[str, np.ndarray]


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


def read(folder: Path, methods: Sequence[str], records: Records) -> Agreement | None:
    """Streams <run>.h5 of all runs image by image; None where there is only one run.

    ValueError if an image has another size in another run, or is none of the records: then a run is not up to date.
    """
    if len(methods) < 2:
        return None
    stores = [store.Store(folder / f"{method}.h5", store.SMALL_MASKS) for method in methods]
    splits = {record.id: record.split for record in records}
    images: dict[str, dict[str, tuple[float, int]]] = {method: {} for method in methods}
    shape = (len(methods), len(methods))
    sums = {split: np.zeros(shape) for split in ("train", "val")}
    counts = {split: np.zeros(shape, np.int64) for split in sums}
    for image_id in sorted({image_id for masks in stores for image_id in masks.ids}):
        if image_id not in splits:
            raise ValueError(f"{folder} has a mask of {image_id!r}, which the records lack; run `dvc repro`")
        masks = [opened.read(image_id, "mask") if image_id in opened else None for opened in stores]
        _same_size(image_id, dict(zip(methods, masks, strict=True)), folder)
        matrix = agreement_matrix(masks)
        sums[splits[image_id]] += np.nan_to_num(matrix)
        counts[splits[image_id]] += ~np.isnan(matrix)
        for method, value, count in zip(methods, *mean_agreement(matrix), strict=True):
            if count:
                images[method][image_id] = float(value), int(count)
    pairs = {
        split: np.divide(sums[split], count, out=np.full(shape, math.nan), where=count > 0)
        for split, count in counts.items()
        if count.any()
    }
    return Agreement(images, pairs)


def _same_size(image_id: str, masks: Mapping[str, np.ndarray | None], folder: Path) -> None:
    sizes = {method: mask.shape for method, mask in masks.items() if mask is not None}
    if len(set(sizes.values())) > 1:
        by_method = ", ".join(f"{height}×{width} in {method}.h5" for method, (height, width) in sizes.items())
        raise ValueError(
            f"{folder}: the mask of {image_id!r} is {by_method}, so not of one photograph; run `dvc repro evaluate`"
        )
