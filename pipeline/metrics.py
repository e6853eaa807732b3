"""Label maps → confusion matrices → IoU and its relatives. docs/metrics.md has the definitions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import ndimage, special

from pipeline.core.labels import BACKGROUND, IGNORE

# how a predicted 255 counts: not at all, as background, or as a pixel of the truth that nobody found
Protocol = Literal["excluded", "background", "miss"]
PROTOCOLS = ("excluded", "background", "miss")
REACH = 0.02  # of the image's diagonal: how far a boundary reaches into an object (Cheng et al., Boundary IoU, CVPR 2021)
LEVELS = 256  # of a confidence, stored as u8
CALIBRATION_BINS = 20
REPLICATES = 500  # of the bootstrap
CONFIDENCE = 0.95  # of the intervals
# P(a Poisson variable of mean 1 is at most k), k = 0..7; the next step is below 2 in a million
POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int, *, ignore: int = IGNORE) -> np.ndarray:
    """u8 maps of one shape → counts i64[classes, classes + 1] of (truth, prediction); the last column counts predicted `ignore`.

    classes includes background. Pixels whose truth is `ignore` never count. ValueError for other values or shapes.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}; they must be of one size")
    kept = truth != ignore
    rows, columns = truth[kept].astype(np.int64), prediction[kept].astype(np.int64)
    columns[columns == ignore] = classes
    if rows.size and (rows.max() >= classes or columns.max() > classes):
        raise ValueError(f"labels hold {max(rows.max(), columns.max())}; allowed are 0..{classes - 1} and {ignore}")
    return np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def under(counts: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts i64[c,c+1] → (hits, pixels of the truth, pixels predicted), i64[c] each, under a protocol for predicted 255."""
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: allowed are {', '.join(PROTOCOLS)}")
    square = counts[:, :-1].copy()
    if protocol == "background":
        square[:, 0] += counts[:, -1]
    actual = square.sum(axis=1)
    if protocol == "miss":
        actual = actual + counts[:, -1]
    return np.diag(square).copy(), actual, square.sum(axis=0)


def iou(counts: np.ndarray, *, protocol: Protocol) -> np.ndarray:
    """f64[c] intersection over union; NaN for a class that is neither in the truth nor predicted."""
    hits, actual, predicted = under(counts, protocol)
    return _ratio(hits, actual + predicted - hits)


def miou(counts: np.ndarray, *, protocol: Protocol) -> float:
    """Mean IoU over the classes that are defined; a class predicted but absent counts as 0. NaN if there is none."""
    values = iou(counts, protocol=protocol)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def rates(counts: np.ndarray, *, protocol: Protocol) -> dict[str, np.ndarray]:
    """Per class f64[c]: iou, precision, recall, over_activation and under_activation; iou + over + under = 1."""
    hits, actual, predicted = under(counts, protocol)
    union = actual + predicted - hits
    return {
        "iou": _ratio(hits, union),
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, actual),
        "over_activation": _ratio(predicted - hits, union),
        "under_activation": _ratio(actual - hits, union),
    }


def pixel_accuracy(counts: np.ndarray, *, protocol: Protocol) -> float:
    hits, actual, _ = under(counts, protocol)
    return float(_ratio(hits.sum(), actual.sum()))


def level_histogram(truth: np.ndarray, winner: np.ndarray, best: np.ndarray, classes: int, bins: int) -> np.ndarray:
    """i64[bins, truth, winner]: all that every threshold needs, from one pass."""
    kept = truth != IGNORE
    at = np.clip((best[kept] * bins).astype(np.int64), 0, bins - 1)
    index = (at * classes + truth[kept]) * classes + winner[kept]
    return np.bincount(index, minlength=bins * classes * classes).reshape(bins, classes, classes)


def threshold_curve(histogram: np.ndarray) -> np.ndarray:
    """i64[bins,truth,winner] → mIoU f64[bins] when scores below k / bins are background, for every k at once."""
    foreground = histogram[::-1].cumsum(axis=0)[::-1]  # [k]: pixels whose score reaches k / bins
    total = histogram.sum(axis=(0, 2))
    values = []
    for counts in foreground:
        full = np.concatenate([counts, np.zeros((len(counts), 1), np.int64)], axis=1)
        full[:, 0] += total - counts.sum(axis=1)
        values.append(miou(full, protocol="background"))
    return np.array(values)


def reach(size: tuple[int, int]) -> int:
    """(h, w) px → px that a boundary band reaches: REACH of the diagonal, at least 1."""
    return max(1, round(REACH * math.hypot(*size)))


def near_change(label: np.ndarray, distance: int) -> np.ndarray:
    """u8[h,w] → bool[h,w]: another label lies at most `distance` rows and columns away (a square of side 2 * distance + 1)."""
    side = 2 * distance + 1
    highest = ndimage.maximum_filter(label, side, mode="nearest")
    return highest != ndimage.minimum_filter(label, side, mode="nearest")


def near_frame(size: tuple[int, int], distance: int) -> np.ndarray:
    """bool[h,w]: at most `distance` px, less one, from the image's frame, which the boundary IoU counts as a boundary."""
    inner = np.ones(size, bool)
    inner[distance:-distance, distance:-distance] = False
    return inner


def counted(truth: np.ndarray, prediction: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """u8 maps → (truth, prediction) in which a predicted 255 is what `protocol` takes it for; `miss` leaves it as 255."""
    if protocol == "background":
        return truth, np.where(prediction == IGNORE, np.uint8(BACKGROUND), prediction)
    if protocol == "excluded":
        return np.where(prediction == IGNORE, np.uint8(IGNORE), truth), prediction
    return truth, prediction


def boundary(
    truth: np.ndarray, prediction: np.ndarray, near_truth: np.ndarray, near_prediction: np.ndarray, classes: int
) -> np.ndarray:
    """u8 maps and their bands bool[h,w] → i64[3,classes]: hits, pixels of the truth, pixels predicted, within the bands.

    A band holds the pixels of a class that an erosion by `reach` would take away, so that IoU of these counts is the boundary IoU.
    Pixels whose truth is 255 never count.
    """
    kept = truth != IGNORE
    both = kept & near_truth & near_prediction & (truth == prediction)
    maps = (truth[both], truth[kept & near_truth], prediction[kept & near_prediction & (prediction != IGNORE)])
    return np.stack([np.bincount(values, minlength=classes) for values in maps])


def iou_of(sums: np.ndarray) -> np.ndarray:
    """[...,3,c] hits, pixels of the truth, pixels predicted → f64[...,c] IoU; NaN where there is no such pixel."""
    hits, actual, predicted = np.moveaxis(sums, -2, 0)
    return _ratio(hits, actual + predicted - hits)


def mean_iou(sums: np.ndarray) -> np.ndarray:
    """[...,3,c] → f64[...] mean IoU over the classes that are defined; NaN where none is."""
    values = iou_of(sums)
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def reliability(counts: np.ndarray) -> dict[str, object]:
    """i64[LEVELS, 2] pixels by confidence (of 255), wrong and right → bins [confidence, accuracy, share] and the expected
    calibration error: the mean over pixels of |confidence - accuracy| of their bin (Guo et al. 2017). Empty bins are left out."""
    level = np.arange(LEVELS) / (LEVELS - 1)
    at = np.minimum((level * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    pixels = np.bincount(at, counts.sum(axis=1), CALIBRATION_BINS)
    sure = _ratio(np.bincount(at, counts.sum(axis=1) * level, CALIBRATION_BINS), pixels)
    right = _ratio(np.bincount(at, counts[:, 1], CALIBRATION_BINS), pixels)
    share, there = pixels / max(1, pixels.sum()), pixels > 0
    bins = [[float(value) for value in row] for row in np.stack([sure, right, share], axis=1)[there]]
    return {"bins": bins, "ece": float((np.abs(sure - right) * share)[there].sum()) if there.any() else None}


def poisson_weights(image_id: str) -> np.ndarray:
    """How often each of REPLICATES resamples draws an image: i64[REPLICATES] of mean 1, from the id alone.

    The Poisson bootstrap (Hanley and MacGibbon 2006) draws images independently, so sums can be streamed in any order.
    """
    drawn = np.frombuffer(hashlib.shake_256(image_id.encode("utf-8")).digest(4 * REPLICATES), "<u4")
    return np.searchsorted(POISSON, drawn / 2**32, side="right")


def interval(replicates: np.ndarray, images: int) -> list[float] | None:
    """Values f64[REPLICATES] of resamples (NaN where undefined) of `images` images → [low, high] of CONFIDENCE; None below 2 images.

    Percentiles are moved outwards for few images, as Student's t asks (Hesterberg 2015, "expanded percentile"): without that, 20
    images would look surer than they are.
    """
    values = replicates[~np.isnan(replicates)]
    if images < 2 or not values.size:
        return None
    wide = special.stdtrit(images - 1, (1 - CONFIDENCE) / 2) * math.sqrt(images / (images - 1))
    low = float(special.ndtr(wide))
    return [float(value) for value in np.quantile(values, [low, 1 - low])]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, in -1..1; None with fewer than 3 pairs or where one side is constant."""
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    from scipy import stats  # its import takes half a second, which the other figures do not need

    result: Any = stats.spearmanr(first, second)  # its stubs do not know the field
    return float(result.statistic)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)
