"""A mask and the truth → counts per image; their sums → figures with intervals, calibration and what one stage does to another's masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.core.labels import IGNORE
from pipeline.metrics import Protocol

CHANGED = 0.01  # of an image's mIoU: below it, a stage has neither mended nor spoilt the image


@dataclass(frozen=True)
class Truth:
    """One image's true mask u8[h,w] and bool[h,w]: where its classes meet, within `distance` px; near that or the frame."""

    mask: np.ndarray
    distance: int
    contour: np.ndarray
    band: np.ndarray
    frame: np.ndarray


def read(mask: np.ndarray) -> Truth:
    """What every stage of one image is held against, computed once."""
    height, width = mask.shape
    distance = metrics.reach((height, width))
    contour, frame = metrics.near_change(mask, distance), metrics.near_frame((height, width), distance)
    return Truth(mask, distance, contour, contour | frame, frame)


@dataclass(frozen=True)
class Counts:
    """One image at one stage.

    confusion, trimap  i64[c, c + 1]; trimap only within the truth's contour bands
    boundary           i64[3, c] hits, pixels of the truth, pixels predicted, in boundary bands
    calibration        i64[LEVELS, 2] pixels by confidence, wrong and right; None where a stage has no confidence
    """

    confusion: np.ndarray
    trimap: np.ndarray
    boundary: np.ndarray
    calibration: np.ndarray | None

    def miou(self, protocol: Protocol) -> float:
        """The image's own, over the classes in its truth or its mask; NaN where all its truth is 255."""
        return metrics.miou(self.confusion, protocol=protocol)


def count(truth: Truth, label: np.ndarray, confidence: np.ndarray | None, classes: int, protocol: Protocol) -> Counts:
    """label u8[h,w] and how sure it is, u8[h,w] of 255 → the counts of one image."""
    mask, shown = metrics.counted(truth.mask, label, protocol)
    near = metrics.near_change(shown, truth.distance) | truth.frame
    calibration = None
    if confidence is not None:
        kept = (truth.mask != IGNORE) & (label != IGNORE)
        right = (label == truth.mask)[kept]
        calibration = np.bincount(confidence[kept] * np.uint16(2) + right, minlength=2 * metrics.LEVELS).reshape(-1, 2)
    return Counts(
        confusion=metrics.confusion(truth.mask, label, classes),
        trimap=metrics.confusion(truth.mask[truth.contour], label[truth.contour], classes),
        boundary=metrics.boundary(mask, shown, truth.band, near, classes),
        calibration=calibration,
    )


@dataclass
class Sums:
    """Counts of many images at one stage, all integers. replicates i64[REPLICATES, 3, c] are the bootstrap's resamples;
    seen i64[c] the images whose truth holds a class."""

    confusion: np.ndarray
    trimap: np.ndarray
    boundary: np.ndarray
    calibration: np.ndarray
    replicates: np.ndarray
    seen: np.ndarray
    images: int = 0

    @staticmethod
    def empty(classes: int) -> Sums:
        return Sums(
            confusion=np.zeros((classes, classes + 1), np.int64),
            trimap=np.zeros((classes, classes + 1), np.int64),
            boundary=np.zeros((3, classes), np.int64),
            calibration=np.zeros((metrics.LEVELS, 2), np.int64),
            replicates=np.zeros((metrics.REPLICATES, 3, classes), np.int64),
            seen=np.zeros(classes, np.int64),
        )

    def add(self, other: Sums) -> None:
        for name in ("confusion", "trimap", "boundary", "calibration", "replicates", "seen", "images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, counts: Counts, weights: np.ndarray, protocol: Protocol) -> None:
        """Adds one image. weights i64[REPLICATES]: how often each resample holds it."""
        self.confusion += counts.confusion
        self.trimap += counts.trimap
        self.boundary += counts.boundary
        if counts.calibration is not None:
            self.calibration += counts.calibration
        sums = np.stack(metrics.under(counts.confusion, protocol))
        there = np.flatnonzero(sums.any(axis=0))
        self.replicates[:, :, there] += weights[:, None, None] * sums[:, there]
        self.seen += sums[1] > 0
        self.images += 1


def figures(sums: Sums, names: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    """Everything that one stage's sums say, as plain values. names: background and the classes."""
    rates = metrics.rates(sums.confusion, protocol=protocol)
    found: dict[str, Any] = {name: mean(values) for name, values in rates.items() if name != "iou"}
    rates["boundary_iou"] = metrics.iou_of(sums.boundary)
    rates["trimap_iou"] = metrics.iou(sums.trimap, protocol=protocol)
    found["miou"] = metrics.miou(sums.confusion, protocol=protocol)
    found |= {name: mean(rates[name]) for name in ("boundary_iou", "trimap_iou")}
    found["pixel_accuracy"] = metrics.pixel_accuracy(sums.confusion, protocol=protocol)
    found["protocols"] = {other: metrics.miou(sums.confusion, protocol=other) for other in metrics.PROTOCOLS}
    values = metrics.iou_of(sums.replicates)
    found["interval"] = {
        "miou": metrics.interval(metrics.mean_iou(sums.replicates), sums.images),
        "classes": {name: metrics.interval(values[:, at], int(sums.seen[at])) for at, name in enumerate(names)},
    }
    if sums.calibration.any():
        found["calibration"] = metrics.reliability(sums.calibration)
    found["classes"] = {name: {rate: values[at] for rate, values in rates.items()} for at, name in enumerate(names)}
    return found


def mean(values: np.ndarray) -> float:
    """Over the classes where it is defined; NaN where none is."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


@dataclass
class Flow:
    """What a stage makes of the masks of the one before. pixels i64[3, c]: mended, spoilt, and all, by true class."""

    pixels: np.ndarray
    images: int = 0
    mended: int = 0
    spoilt: int = 0

    @staticmethod
    def empty(classes: int) -> Flow:
        return Flow(np.zeros((3, classes), np.int64))

    def add(self, other: Flow) -> None:
        for name in ("pixels", "images", "mended", "spoilt"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, pixels: np.ndarray, before: float, after: float) -> None:
        """Adds one image: its pixels, and its mIoU before and after."""
        self.pixels += pixels
        self.images += 1
        self.mended += after - before > CHANGED
        self.spoilt += before - after > CHANGED

    def as_values(self, names: Sequence[str]) -> dict[str, Any]:
        """Shares of the pixels of each true class, and of all."""
        mended, spoilt, total = self.pixels
        classes = {
            name: {"mended": int(mended[at]) / int(total[at]), "spoilt": int(spoilt[at]) / int(total[at])}
            for at, name in enumerate(names)
            if total[at]
        }
        size = max(1, int(total.sum()))
        return {
            "mended": int(mended.sum()) / size,
            "spoilt": int(spoilt.sum()) / size,
            "images": self.images,
            "images_mended": self.mended,
            "images_spoilt": self.spoilt,
            "classes": classes,
        }


def moved(truth: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int, protocol: Protocol) -> np.ndarray:
    """u8 maps of one image → i64[3, c]: pixels that were wrong and are right, were right and are wrong, and all, by true class.

    `excluded` leaves out pixels that are 255 in either mask; under `miss` 255 is wrong.
    """
    mask, first = metrics.counted(truth, before, protocol)
    mask, second = metrics.counted(mask, after, protocol)
    kept = mask != IGNORE
    was, is_now = first == mask, second == mask
    return np.stack(
        [np.bincount(mask[which], minlength=classes) for which in (kept & ~was & is_now, kept & was & ~is_now, kept)]
    )
