"""Figures → small CSV files for `dvc plots`, whose templates draw them without a network."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DIGITS = 5


def write_thresholds(curve: Sequence[float] | np.ndarray, path: Path) -> None:
    """threshold.csv: mIoU f64[bins] of the score maps at threshold k / bins. Without truth, the header alone."""
    _table(path, ["threshold", "miou"], ((k / len(curve), round(value, DIGITS)) for k, value in enumerate(curve)))


def write_per_class(figures: dict[str, Any], path: Path) -> None:
    """per_class.csv: IoU of the pseudo-masks. figures: audit/<run>.json as plain values."""
    classes = figures["stages"].get("pseudo_masks", {}).get("classes", {})
    _table(path, ["class", "iou"], ((name, rates["iou"]) for name, rates in classes.items() if rates["iou"] is not None))


def write_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """confusion.csv, whose template counts rows: a row per percent of each true class.

    counts i64[c, c + 1] of (truth, prediction), the last column those of a predicted 255; names: background and the classes.
    """
    percent = np.round(100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)).astype(int)
    cells = (
        (actual, predicted)
        for row, actual in enumerate(names)
        for column, predicted in enumerate([*names, "ignored"])
        for _ in range(percent[row, column])
    )
    _table(path, ["actual", "predicted"], cells)


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
