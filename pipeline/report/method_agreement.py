"""Small masks of all columns → how far the methods agree: on each image, and two by two."""

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
    """How alike the last masks of the columns are, 0..1.

    images  method → id → (mean over the other methods, how many these are); without images that no other method has
    pairs   split → f64[m,m], the mean over the images that both methods have; symmetric, 1 on the diagonal, NaN where there are none
    """

    images: Mapping[str, Mapping[str, tuple[float, int]]]
    pairs: Mapping[str, np.ndarray]


def alike(first: np.ndarray, second: np.ndarray) -> float:
    """Two masks of one size → mean IoU between them over the classes, background included, that either shows. Pixels that are 255
    in one of them are left out; NaN where that leaves none."""
    kept = (first != IGNORE) & (second != IGNORE)
    a, b = first[kept], second[kept]
    sizes = np.bincount(a, minlength=256) + np.bincount(b, minlength=256)
    both = np.bincount(a[a == b], minlength=256)
    there = sizes > 0
    return float((both[there] / (sizes - both)[there]).mean()) if there.any() else math.nan


def table(masks: Sequence[np.ndarray | None]) -> np.ndarray:
    """Masks of one image, None where a column lacks it → f64[m,m] as `alike` finds it; NaN where one is missing."""
    found = np.full((len(masks), len(masks)), math.nan)
    for at, mask in enumerate(masks):
        if mask is not None:
            found[at, at] = 1.0
    for a, b in combinations(range(len(masks)), 2):
        first, second = masks[a], masks[b]
        if first is not None and second is not None:
            found[a, b] = found[b, a] = alike(first, second)
    return found


def others(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f64[m,m] of `table` → f64[m]: the mean over the other columns, NaN where there is none; and i64[m], how many these are."""
    apart = found.copy()
    np.fill_diagonal(apart, math.nan)
    known = ~np.isnan(apart)
    count = known.sum(axis=1)
    return np.divide(np.where(known, apart, 0).sum(axis=1), count, out=np.full(len(found), math.nan), where=count > 0), count


def read(folder: Path, methods: Sequence[str], records: Records) -> Agreement | None:
    """Streams <m>.h5 of all columns image by image; None where there is only one column.

    ValueError if an image has another size in another column, or is none of the records: then a column is not up to date.
    """
    if len(methods) < 2:
        return None
    stores = [store.Store(folder / f"{method}.h5", store.SMALL_MASKS) for method in methods]
    splits = {record.id: record.split for record in records}
    images: dict[str, dict[str, tuple[float, int]]] = {method: {} for method in methods}
    shape = (len(methods), len(methods))
    sums = {split: np.zeros(shape) for split in ("train", "val")}
    counts = {split: np.zeros(shape, np.int64) for split in sums}
    for image_id in sorted({image_id for one in stores for image_id in one.ids}):
        if image_id not in splits:
            raise ValueError(f"{folder} has a mask of {image_id!r}, which the records lack; run `dvc repro`")
        masks = [one.read(image_id, "mask") if image_id in one else None for one in stores]
        _same_size(image_id, dict(zip(methods, masks, strict=True)), folder)
        found = table(masks)
        sums[splits[image_id]] += np.nan_to_num(found)
        counts[splits[image_id]] += ~np.isnan(found)
        for method, value, count in zip(methods, *others(found), strict=True):
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
        told = ", ".join(f"{height}×{width} in {method}.h5" for method, (height, width) in sizes.items())
        raise ValueError(f"{folder}: the mask of {image_id!r} is {told}, so not of one photograph; run `dvc repro evaluate`")
