"""A mask and the truth → counts of an image; their sums → IoU and its relatives, intervals, calibration, flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.core.labels import IGNORE
from pipeline.metrics import Protocol

MIN_CHANGE = 0.01  # of an image's mIoU: below it, a stage has neither corrected nor broken the image


@dataclass(frozen=True)
class Truth:
    """An image's true mask with the bands in which boundary IoU and trimap IoU are counted.

    mask      u8[h,w] mask values, 255 where the truth is unknown
    distance  px, half the width of the bands: `metrics.boundary_distance`
    contour   bool[h,w], within `distance` of a change of label, the change to 255 included: the trimap
    frame     bool[h,w], within `distance` of the image's frame
    band      contour | frame: boundary IoU counts the frame as a boundary (Cheng et al. 2021)
    """

    mask: np.ndarray
    distance: int
    contour: np.ndarray
    band: np.ndarray
    frame: np.ndarray


def with_bands(mask: np.ndarray) -> Truth:
    """True mask u8[h,w] → `Truth`. It is the same for all stages of an image, so it is made once per image."""
    height, width = mask.shape
    distance = metrics.boundary_distance((height, width))
    contour, frame = metrics.near_label_change(mask, distance), metrics.near_frame((height, width), distance)
    return Truth(mask, distance, contour, contour | frame, frame)


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of one image at one stage; c classes, background included.

    confusion    i64[c, c + 1] of (truth, prediction); the last column counts a predicted 255
    trimap       the same within the truth's contour
    boundary     i64[3, c] hits, pixels of the truth, pixels predicted, in the bands of the truth and of the mask
    calibration  i64[CONFIDENCE_LEVELS, 2] by confidence, wrong and right; None where a stage has no confidence
    """

    confusion: np.ndarray
    trimap: np.ndarray
    boundary: np.ndarray
    calibration: np.ndarray | None

    def miou(self, protocol: Protocol) -> float:
        """The image's own, over the classes in its truth or its mask; NaN where all its truth is 255."""
        return metrics.miou(self.confusion, protocol=protocol)


def count(truth: Truth, label: np.ndarray, confidence: np.ndarray | None, classes: int, protocol: Protocol) -> ImageCounts:
    """Mask values u8[h,w] and confidence u8[h,w] (of 255) → the counts of one image. classes includes background."""
    mask, predicted = metrics.apply_protocol(truth.mask, label, protocol)
    band = metrics.near_label_change(predicted, truth.distance) | truth.frame
    calibration = None
    if confidence is not None:
        kept = (truth.mask != IGNORE) & (label != IGNORE)
        right = (label == truth.mask)[kept]
        bins = np.bincount(confidence[kept] * np.uint16(2) + right, minlength=2 * metrics.CONFIDENCE_LEVELS)
        calibration = bins.reshape(-1, 2)
    return ImageCounts(
        confusion=metrics.confusion(truth.mask, label, classes),
        trimap=metrics.confusion(truth.mask[truth.contour], label[truth.contour], classes),
        boundary=metrics.boundary_counts(mask, predicted, truth.band, band, classes),
        calibration=calibration,
    )


@dataclass
class StageCounts:
    """Sums of `ImageCounts` over the images of one stage, all integers.

    confusion, trimap, boundary, calibration  as in ImageCounts
    replicates         i64[REPLICATES, 3, c] hits, pixels of the truth, pixels predicted in each resample of the bootstrap
    images_with_class  i64[c] images whose truth holds the class
    images             all that have truth
    """

    confusion: np.ndarray
    trimap: np.ndarray
    boundary: np.ndarray
    calibration: np.ndarray
    replicates: np.ndarray
    images_with_class: np.ndarray
    images: int = 0

    @staticmethod
    def empty(classes: int) -> StageCounts:
        return StageCounts(
            confusion=np.zeros((classes, classes + 1), np.int64),
            trimap=np.zeros((classes, classes + 1), np.int64),
            boundary=np.zeros((3, classes), np.int64),
            calibration=np.zeros((metrics.CONFIDENCE_LEVELS, 2), np.int64),
            replicates=np.zeros((metrics.REPLICATES, 3, classes), np.int64),
            images_with_class=np.zeros(classes, np.int64),
        )

    def add(self, other: StageCounts) -> None:
        for name in ("confusion", "trimap", "boundary", "calibration", "replicates", "images_with_class", "images"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, counts: ImageCounts, weights: np.ndarray, protocol: Protocol) -> None:
        """Adds one image. weights i64[REPLICATES]: how often each resample draws it."""
        self.confusion += counts.confusion
        self.trimap += counts.trimap
        self.boundary += counts.boundary
        if counts.calibration is not None:
            self.calibration += counts.calibration
        totals = np.stack(metrics.class_totals(counts.confusion, protocol))
        present = np.flatnonzero(totals.any(axis=0))
        self.replicates[:, :, present] += weights[:, None, None] * totals[:, present]
        self.images_with_class += totals[1] > 0
        self.images += 1


def figures(counts: StageCounts, names: Sequence[str], protocol: Protocol) -> dict[str, Any]:
    """All figures of one stage that need truth, as plain values, NaN where undefined. names: background and the classes."""
    rates = metrics.rates(counts.confusion, protocol=protocol)
    values: dict[str, Any] = {name: class_mean(of_class) for name, of_class in rates.items() if name != "iou"}
    rates["boundary_iou"] = metrics.iou_of_totals(counts.boundary)
    rates["trimap_iou"] = metrics.iou(counts.trimap, protocol=protocol)
    values["miou"] = metrics.miou(counts.confusion, protocol=protocol)
    values |= {name: class_mean(rates[name]) for name in ("boundary_iou", "trimap_iou")}
    values["pixel_accuracy"] = metrics.pixel_accuracy(counts.confusion, protocol=protocol)
    values["protocols"] = {name: metrics.miou(counts.confusion, protocol=name) for name in metrics.PROTOCOLS}
    replicates = metrics.iou_of_totals(counts.replicates)
    values["interval"] = {
        "miou": metrics.interval(metrics.miou_of_totals(counts.replicates), counts.images),
        "classes": {
            name: metrics.interval(replicates[:, at], int(counts.images_with_class[at])) for at, name in enumerate(names)
        },
    }
    if counts.calibration.any():
        values["calibration"] = metrics.reliability(counts.calibration)
    values["classes"] = {name: {rate: of_class[at] for rate, of_class in rates.items()} for at, name in enumerate(names)}
    return values


def class_mean(values: np.ndarray) -> float:
    """Over the classes where it is defined; NaN where none is."""
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


@dataclass
class Flow:
    """What a stage changes in the masks of the stage before, summed over images.

    pixels     i64[3, c] corrected (wrong before, right after), broken (right before, wrong after), and all, by true class
    images     that have truth
    corrected  images whose own mIoU rose by more than MIN_CHANGE
    broken     images whose own mIoU fell by more than that
    """

    pixels: np.ndarray
    images: int = 0
    corrected: int = 0
    broken: int = 0

    @staticmethod
    def empty(classes: int) -> Flow:
        return Flow(np.zeros((3, classes), np.int64))

    def add(self, other: Flow) -> None:
        for name in ("pixels", "images", "corrected", "broken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def count(self, pixels: np.ndarray, before: float, after: float) -> None:
        """Adds one image: its `changed_pixels`, and its mIoU before and after."""
        self.pixels += pixels
        self.images += 1
        self.corrected += after - before > MIN_CHANGE
        self.broken += before - after > MIN_CHANGE

    def as_values(self, names: Sequence[str]) -> dict[str, Any]:
        """Fractions of all pixels that have truth and, under `classes`, of those of each true class that has any."""
        corrected, broken, total = self.pixels
        classes = {
            name: {"corrected": int(corrected[at]) / int(total[at]), "broken": int(broken[at]) / int(total[at])}
            for at, name in enumerate(names)
            if total[at]
        }
        size = max(1, int(total.sum()))
        return {
            "corrected": int(corrected.sum()) / size,
            "broken": int(broken.sum()) / size,
            "images": self.images,
            "images_corrected": self.corrected,
            "images_broken": self.broken,
            "classes": classes,
        }


def changed_pixels(truth: np.ndarray, before: np.ndarray, after: np.ndarray, classes: int, protocol: Protocol) -> np.ndarray:
    """Masks u8[h,w] of one image at two stages → i64[3, c] corrected, broken, and all pixels, by true class.

    `excluded` leaves out pixels that are 255 in either mask; under `miss` 255 is wrong.
    """
    mask, first = metrics.apply_protocol(truth, before, protocol)
    mask, second = metrics.apply_protocol(mask, after, protocol)
    kept = mask != IGNORE
    right_before, right_after = first == mask, second == mask
    chosen = (kept & ~right_before & right_after, kept & right_before & ~right_after, kept)
    return np.stack([np.bincount(mask[pixels], minlength=classes) for pixels in chosen])
