"""Score maps and an image's segments → class scores per segment, and the segment that each pixel belongs to (FMA-WSSS).

Shape letters: s segments, k classes present in the image, h w its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.imaging.threshold import HIGHEST, LOWEST

EPS = (
    1e-7  # FMA-WSSS adds it to a class's spread: of two classes' best segments, the one of the class with more contrast wins
)
LEAST_SPREAD = 1e-6  # of a class's means over an image's segments; below it min-max would only amplify noise
ABSENT = -1  # in place of a segment's number: the pixel lies in no segment


def means_of_runs(scores: np.ndarray, runs: Sequence[np.ndarray]) -> np.ndarray:
    """Score maps f32[k,h,w] and the run lengths of s segments (reader.Segments.runs) → f64[s,k], mean scores inside each.

    Differences of one class's cumulative sum stand for the (s, hw) × (hw, k) product, so that no mask is ever decoded.
    """
    if not runs:
        return np.zeros((0, len(scores)))
    ends = [np.cumsum(lengths) for lengths in runs]
    first = np.concatenate([end[:-1:2] for end in ends])
    after = np.concatenate([end[1::2] for end in ends])
    segment = np.repeat(np.arange(len(runs)), [len(end) // 2 for end in ends])
    area = np.bincount(segment, after - first, len(runs))
    means = []
    for plane in scores:
        total = np.concatenate([[0.0], np.cumsum(plane.T, dtype=np.float64)])  # column by column, as RLE counts
        means.append(np.bincount(segment, total[after] - total[first], len(runs)) / area)
    return np.stack(means, axis=1)


def means_of_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score maps f32[k,h,w] and segment numbers i64[h,w] from 0 on → f64[s,k], mean scores inside each segment."""
    flat = labels.ravel()
    area = np.maximum(np.bincount(flat), 1)
    return np.stack([np.bincount(flat, plane.ravel(), len(area)) / area for plane in scores], axis=1)


def power_at(threshold: float) -> float:
    """The power at which (1 - threshold)^power = threshold: a segment whose best class scores exactly the threshold, in
    0..1, ties with background."""
    inside = min(max(threshold, LOWEST), HIGHEST)
    return float(np.log(inside) / np.log1p(-inside))


def votes(means: np.ndarray, *, normalise: str, power: float) -> np.ndarray:
    """Mean scores f64[s,k] → f64[s,k+1] in 0..1, plane 0 the background's score (1 - best class)^power. The highest wins.

    normalise: "minmax" scales each class over the image's segments to 0..1; "none" leaves the means as they are.
    A class whose means hardly differ is left as it is under minmax, where FMA-WSSS makes it 0: a single segment has no
    spread.
    """
    scores = np.clip(means, 0, 1)
    if normalise == "minmax" and len(scores):
        low, spread = scores.min(axis=0), np.ptp(scores, axis=0)
        wide = spread > LEAST_SPREAD
        scores[:, wide] = (scores[:, wide] - low[wide]) / (spread[wide] + EPS)
    best = scores.max(axis=1, keepdims=True)
    return np.concatenate([(1 - best) ** power, scores], axis=1)


def with_foreground(voted: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Votes f64[s,k+1] and how surely each segment is foreground of any class, f64[s] in 0..1 → f64[s,k+1]: classes times
    foreground, background times the rest, as two independent witnesses. Neither is ever certain, so no segment loses all."""
    sure = np.clip(foreground, LEAST_SPREAD, 1 - LEAST_SPREAD)[:, None]
    return voted * np.concatenate([1 - sure, np.repeat(sure, voted.shape[1] - 1, axis=1)], axis=1)


def painted(runs: Sequence[np.ndarray], levels: np.ndarray, confidence: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Overlapping segments → i64[h,w], the number of the segment that each pixel belongs to, ABSENT where there is none.

    Painted by ascending (level, confidence), as in FMA-WSSS: what comes later overwrites. Of equals, the smaller is painted
    later, then the later in the file.

    runs, levels  as in reader.Segments
    confidence    f64[s], the segment's highest score
    size          (h, w) px
    """
    h, w = size
    canvas = np.full(h * w, ABSENT)
    area = np.array([lengths[1::2].sum() for lengths in runs])
    for number in np.lexsort((-area, confidence, levels)):
        inside = np.arange(len(runs[number])) % 2 == 1
        canvas[np.repeat(inside, runs[number])] = number
    return canvas.reshape(w, h).T
