"""Planes of one image as NumPy arrays: upsampling, background, labels. Shared by refiners and evaluate, free of torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.core.labels import BACKGROUND, IGNORE


def upsample(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """f32[k,gh,gw] → f32[k,h,w], bilinear with half-pixel centres (align_corners False). size is (h, w) px."""
    h, w = size
    out = np.empty((len(planes), h, w), np.float32)
    for plane, target in zip(np.ascontiguousarray(planes, np.float32), out, strict=True):
        target[:] = np.asarray(Image.fromarray(plane).resize((w, h), Image.Resampling.BILINEAR))
    return out


def stretched(maps: np.ndarray) -> np.ndarray:
    """f32[k,h,w] → the same from 0 to 1 over all maps; those that are the same everywhere become 0."""
    spread = np.ptp(maps) if maps.size else 0
    return (maps - maps.min()) / spread if spread > 0 else np.zeros_like(maps)


def with_background(scores: np.ndarray, threshold: float) -> np.ndarray:
    """f32[k,h,w] → f32[k+1,h,w] with a constant background plane of height `threshold` in front."""
    return np.concatenate([np.full((1, *scores.shape[1:]), threshold, np.float32), scores])


def fitted(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(rows, columns) px with the long side at `long_side`; smaller images keep their size, and no side falls below 1."""
    scale = min(1.0, long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mask values u8[h,w] → u8[size]: the pixel under the centre of each new one.

    In whole numbers: where a centre lies on the border of two pixels the later one is taken, always. Pillow adds up rounded
    steps and takes now one, now the other, which a third of all pairs of sizes show.
    """
    if label.shape == tuple(size):
        return label
    rows, columns = ((np.arange(new) * 2 + 1) * old // (2 * new) for old, new in zip(label.shape, size, strict=True))
    return label[rows[:, None], columns]


Probabilities = Literal["softmax", "share"]


def probabilities(stacked: Any, kind: Probabilities) -> Any:
    """Tensor f32[k+1,·,·] ≥ 0 with background in front → the same, summing to 1: softmax of the planes (AFA, which flattens
    them), or each one's share of the sum."""
    return stacked.softmax(dim=0) if kind == "softmax" else stacked / stacked.sum(dim=0)


def labels_of(planes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Planes [background, k classes] f32[k+1,h,w] → u8[h,w] mask values; ties go to the earlier plane."""
    values = np.concatenate([[BACKGROUND], np.asarray(classes, np.int64) + 1]).astype(np.uint8)
    return values[planes.argmax(axis=0)]


def confidence_of(planes: np.ndarray) -> np.ndarray:
    """Planes f32[k+1,h,w] ≥ 0 → f32[h,w] in 0..1: the winner's share of the sum."""
    total = planes.sum(axis=0)
    return np.divide(planes.max(axis=0), total, out=np.ones_like(total), where=total > 0)


def winners(probabilities: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """f32[p,gh,gw] ≥ 0 → label u8[h,w] and confidence f32[h,w], the winner's share of the sum. Ties go to the earlier plane.

    Enlarges (bilinear) one plane at a time: p planes of a whole photograph never exist at once.
    """
    label, best, total = np.zeros(size, np.uint8), np.zeros(size, np.float32), np.zeros(size, np.float32)
    for value, plane in enumerate(probabilities):
        full = plane if plane.shape == size else upsample(plane[None], size)[0]
        higher = full > best
        label[higher], best[higher] = value, full[higher]
        total += full
    return label, np.clip(np.divide(best, total, out=np.ones_like(total), where=total > 0), 0, 1)


def trinary_labels(low: Any, high: Any) -> Any:
    """Labels at a low and a high threshold → one label map (AFA, section 3 step 6; IRN's confident labels).

    Where `high` sees a class, that class; background where both see background; 255 where only `low` sees a class.
    Takes arrays or tensors of u8 mask values, any shape.
    """
    out = high * 1
    out[high == BACKGROUND] = IGNORE
    out[(high == BACKGROUND) & (low == BACKGROUND)] = BACKGROUND
    return out
