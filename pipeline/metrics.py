"""Label maps → confusion matrices → IoU and its relatives. docs/metrics.md has the definitions."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipeline.core.labels import IGNORE

# how a predicted 255 counts: not at all, as background, or as a pixel of the truth that nobody found
Protocol = Literal["excluded", "background", "miss"]
PROTOCOLS = ("excluded", "background", "miss")


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


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=np.asarray(below) > 0)
