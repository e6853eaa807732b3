"""Label maps → confusion matrices → IoU and its relatives. docs/metrics.md has the definitions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy import ndimage, special

from pipeline.core.labels import BACKGROUND, IGNORE

# how a predicted 255 counts: not at all, as background, or as a miss, a pixel of the truth that no class is predicted for
Protocol = Literal["excluded", "background", "miss"]
PROTOCOLS = ("excluded", "background", "miss")
DILATION_RATIO = 0.02  # boundary distance over the image's diagonal (Cheng et al., Boundary IoU, CVPR 2021)
CONFIDENCE_LEVELS = 256  # that a confidence has as u8
CALIBRATION_BINS = 20
REPLICATES = 500  # of the bootstrap
COVERAGE = 0.95  # of the intervals
# P(a Poisson variable of mean 1 is at most k), k = 0..7; the next step is below 2 in a million
POISSON_CDF = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(8)])


def confusion(truth: np.ndarray, prediction: np.ndarray, classes: int, *, ignore: int = IGNORE) -> np.ndarray:
    """Masks u8 of one shape → counts i64[classes, classes + 1] of (truth, prediction).

    The last column counts a predicted `ignore`; classes includes background. Pixels whose truth is `ignore` never count.
    ValueError for other values or shapes.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}; they must be of one size")
    kept = truth != ignore
    rows, columns = truth[kept].astype(np.int64), prediction[kept].astype(np.int64)
    columns[columns == ignore] = classes
    if rows.size and (rows.max() >= classes or columns.max() > classes):
        raise ValueError(f"labels hold {max(rows.max(), columns.max())}; allowed are 0..{classes - 1} and {ignore}")
    return np.bincount(rows * (classes + 1) + columns, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def class_totals(counts: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confusion i64[c,c+1] → totals by class: hits, pixels of the truth, pixels predicted, i64[c] each.

    protocol: how a predicted 255 counts. ValueError for an unknown one.
    """
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
    """Confusion i64[c,c+1] → f64[c] intersection over union; NaN for a class that is neither in the truth nor predicted."""
    hits, actual, predicted = class_totals(counts, protocol)
    return _ratio(hits, actual + predicted - hits)


def miou(counts: np.ndarray, *, protocol: Protocol) -> float:
    """Confusion i64[c,c+1] → mean IoU over the classes that are in the truth or predicted; NaN if there is none."""
    values = iou(counts, protocol=protocol)
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def rates(counts: np.ndarray, *, protocol: Protocol) -> dict[str, np.ndarray]:
    """Confusion i64[c,c+1] → f64[c] by name: iou, precision, recall, over_activation, under_activation. NaN where undefined.

    Over- and under-activation are false positives and false negatives over the union, so iou + over + under = 1.
    """
    hits, actual, predicted = class_totals(counts, protocol)
    union = actual + predicted - hits
    return {
        "iou": _ratio(hits, union),
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, actual),
        "over_activation": _ratio(predicted - hits, union),
        "under_activation": _ratio(actual - hits, union),
    }


def pixel_accuracy(counts: np.ndarray, *, protocol: Protocol) -> float:
    """Confusion i64[c,c+1] → hits of all classes over all pixels of the truth, 0..1; NaN without any."""
    hits, actual, _ = class_totals(counts, protocol)
    return float(_ratio(hits.sum(), actual.sum()))


def score_histogram(truth: np.ndarray, winner: np.ndarray, best: np.ndarray, classes: int, bins: int) -> np.ndarray:
    """Pixels of one image by score, truth and best class: i64[bins, classes, classes], for `threshold_curve`.

    truth, winner u8[h,w] mask values, best f32[h,w] the winner's score in 0..1; classes includes background. Pixels whose
    truth is 255 do not count.
    """
    kept = truth != IGNORE
    at = np.clip((best[kept] * bins).astype(np.int64), 0, bins - 1)
    index = (at * classes + truth[kept]) * classes + winner[kept]
    return np.bincount(index, minlength=bins * classes * classes).reshape(bins, classes, classes)


def threshold_curve(histogram: np.ndarray) -> np.ndarray:
    """`score_histogram`s summed over images i64[bins,c,c] → mIoU f64[bins]: entry k is that at threshold k / bins.

    Scores below the threshold are background. One pass over the pixels serves all thresholds.
    """
    foreground = histogram[::-1].cumsum(axis=0)[::-1]  # [k]: pixels whose score reaches k / bins
    total = histogram.sum(axis=(0, 2))
    values = []
    for counts in foreground:
        full = np.concatenate([counts, np.zeros((len(counts), 1), np.int64)], axis=1)
        full[:, 0] += total - counts.sum(axis=1)
        values.append(miou(full, protocol="background"))
    return np.array(values)


def boundary_distance(size: tuple[int, int]) -> int:
    """(h, w) px → width of a boundary band in px: DILATION_RATIO of the diagonal, at least 1."""
    return max(1, round(DILATION_RATIO * math.hypot(*size)))


def near_label_change(label: np.ndarray, distance: int) -> np.ndarray:
    """Mask u8[h,w] → bool[h,w]: another value lies at most `distance` px away along rows and along columns."""
    side = 2 * distance + 1
    highest = ndimage.maximum_filter(label, side, mode="nearest")
    return highest != ndimage.minimum_filter(label, side, mode="nearest")


def near_frame(size: tuple[int, int], distance: int) -> np.ndarray:
    """(h, w) px → bool[h,w]: the outermost `distance` rows and columns: boundary IoU counts the frame as a boundary."""
    inner = np.ones(size, bool)
    inner[distance:-distance, distance:-distance] = False
    return inner


def apply_protocol(truth: np.ndarray, prediction: np.ndarray, protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Masks u8[h,w] → (truth, prediction) in which a predicted 255 is what `protocol` makes of it.

    Under `background` the prediction is 0 there, under `excluded` the truth is 255; `miss` changes nothing.
    """
    if protocol == "background":
        return truth, np.where(prediction == IGNORE, np.uint8(BACKGROUND), prediction)
    if protocol == "excluded":
        return np.where(prediction == IGNORE, np.uint8(IGNORE), truth), prediction
    return truth, prediction


def boundary_counts(
    truth: np.ndarray, prediction: np.ndarray, near_truth: np.ndarray, near_prediction: np.ndarray, classes: int
) -> np.ndarray:
    """Masks u8[h,w] and their bands bool[h,w] → i64[3,classes] hits, pixels of the truth, pixels predicted, in the bands.

    A mask's band is within the boundary distance of a change of label or of the frame: the pixels that an erosion of each
    class would take away. So the IoU of these totals is the boundary IoU. Pixels whose truth is 255 never count.
    """
    kept = truth != IGNORE
    hits = kept & near_truth & near_prediction & (truth == prediction)
    values = (truth[hits], truth[kept & near_truth], prediction[kept & near_prediction & (prediction != IGNORE)])
    return np.stack([np.bincount(of_total, minlength=classes) for of_total in values])


def iou_of_totals(totals: np.ndarray) -> np.ndarray:
    """i64[...,3,c] hits, pixels of the truth, pixels predicted → f64[...,c] IoU; NaN where the union is empty."""
    hits, actual, predicted = np.moveaxis(totals, -2, 0)
    return _ratio(hits, actual + predicted - hits)


def miou_of_totals(totals: np.ndarray) -> np.ndarray:
    """i64[...,3,c] → f64[...] mean IoU over the classes whose IoU is defined; NaN where none is."""
    values = iou_of_totals(totals)
    return _ratio(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def reliability(counts: np.ndarray) -> dict[str, object]:
    """Reliability diagram and expected calibration error (Guo et al. 2017), as plain values.

    counts  i64[CONFIDENCE_LEVELS, 2] pixels by confidence (of 255), wrong and right
    bins    [mean confidence, accuracy, fraction of the pixels] of each of CALIBRATION_BINS that has pixels
    ece     mean over pixels of |confidence - accuracy| of their bin; None without pixels
    """
    confidences = np.arange(CONFIDENCE_LEVELS) / (CONFIDENCE_LEVELS - 1)
    at = np.minimum((confidences * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    pixels = np.bincount(at, counts.sum(axis=1), CALIBRATION_BINS)
    confidence = _ratio(np.bincount(at, counts.sum(axis=1) * confidences, CALIBRATION_BINS), pixels)
    accuracy = _ratio(np.bincount(at, counts[:, 1], CALIBRATION_BINS), pixels)
    fraction, filled = pixels / max(1, pixels.sum()), pixels > 0
    bins = [[float(value) for value in row] for row in np.stack([confidence, accuracy, fraction], axis=1)[filled]]
    ece = float((np.abs(confidence - accuracy) * fraction)[filled].sum()) if filled.any() else None
    return {"bins": bins, "ece": ece}


def poisson_weights(image_id: str) -> np.ndarray:
    """How often each of REPLICATES resamples draws an image: i64[REPLICATES] of mean 1, from the id alone.

    The Poisson bootstrap (Hanley and MacGibbon 2006) draws images independently, so sums can be streamed in any order.
    """
    drawn = np.frombuffer(hashlib.shake_256(image_id.encode("utf-8")).digest(4 * REPLICATES), "<u4")
    return np.searchsorted(POISSON_CDF, drawn / 2**32, side="right")


def interval(replicates: np.ndarray, images: int) -> list[float] | None:
    """Values f64[REPLICATES] of resamples of `images` images, NaN where undefined → interval [low, high] of COVERAGE.

    None below 2 images, and where no resample has a value. Percentiles are moved outwards for few images, as Student's t
    asks (Hesterberg 2015, "expanded percentile"): without that, 20 images would give too narrow an interval.
    """
    values = replicates[~np.isnan(replicates)]
    if images < 2 or not values.size:
        return None
    wide = special.stdtrit(images - 1, (1 - COVERAGE) / 2) * math.sqrt(images / (images - 1))
    low = float(special.ndtr(wide))
    return [float(value) for value in np.quantile(values, [low, 1 - low])]


def spearman(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float | None:
    """Spearman's rank correlation, in -1..1; None with fewer than 3 pairs or where one side is constant."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    from scipy import stats  # its import takes half a second, which the other figures do not need

    result: Any = stats.spearmanr(first, second)  # its stubs do not know the field
    return float(result.statistic)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)
