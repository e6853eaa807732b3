"""Every stage's result + truth → figures and curves. The only place that opens truth after prepare."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from pipeline import metrics
from pipeline.core import store
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Evaluate
from pipeline.imaging import planes

PER_ITEM = 32  # images that one process scores at a time
DIGITS = 5
# stage → (store it reads, split); in the order of the pipeline
STAGES = {
    "score_maps": "train", "decoder": "train", "refined": "train", "pseudo_masks": "train",
    "score_maps_val": "val", "decoder_val": "val", "predictions": "val",
}  # fmt: skip
WITHOUT_CONFIDENCE = ("decoder", "decoder_val")


@dataclass(frozen=True)
class Inputs:
    """Where the results lie, picklable."""

    truth: Path
    scoremaps: Path
    refined: Path
    pseudo_masks: Path
    predictions: Path
    level: float
    settings: Evaluate
    labels: LabelSpace
    root: Path


@dataclass
class Tally:
    """Sums over images, all integers, so that their order does not matter."""

    confusion: dict[str, np.ndarray]
    histogram: np.ndarray  # i64[bins, truth, winner]
    pixels: dict[str, np.ndarray]  # stage → i64[4]: all, foreground, ignored, summed confidence (of 255)
    tags: dict[str, np.ndarray]  # stage → i64[2]: tagged classes, those without a pixel
    images: dict[str, int]
    scored: dict[str, int]
    quality: list[tuple[str, float]] = field(default_factory=list)  # (id, mIoU of its last mask, or its mean confidence)

    @staticmethod
    def empty(classes: int, bins: int) -> Tally:
        return Tally(
            confusion={stage: np.zeros((classes, classes + 1), np.int64) for stage in STAGES},
            histogram=np.zeros((bins, classes, classes), np.int64),
            pixels={stage: np.zeros(4, np.int64) for stage in STAGES},
            tags={stage: np.zeros(2, np.int64) for stage in STAGES},
            images=dict.fromkeys(STAGES, 0),
            scored=dict.fromkeys(STAGES, 0),
        )

    def add(self, other: Tally) -> None:
        for stage in STAGES:
            self.confusion[stage] += other.confusion[stage]
            self.pixels[stage] += other.pixels[stage]
            self.tags[stage] += other.tags[stage]
            self.images[stage] += other.images[stage]
            self.scored[stage] += other.scored[stage]
        self.histogram += other.histogram
        self.quality += other.quality


@dataclass(frozen=True)
class Stores:
    scoremaps: store.Store
    refined: store.Store
    pseudo_masks: store.Store
    predictions: store.Store
    truth: store.Store


def open_stores(inputs: Inputs) -> Stores:
    return Stores(
        scoremaps=store.Store(inputs.scoremaps, store.SCORE_MAPS),
        refined=store.Store(inputs.refined, store.REFINED),
        pseudo_masks=store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS),
        predictions=store.Store(inputs.predictions, store.PREDICTIONS),
        truth=store.Store(inputs.truth, store.TRUTH),
    )


def chosen_level(refiner: Path) -> float:
    """The background level that fit_refiner found."""
    with safe_open(refiner, "np") as file:  # a learned refiner's network stays where it is
        return float(file.get_tensor("background")[0])


_OPENED: dict[str, Stores] = {}  # one per process


def opened(inputs: Inputs) -> Stores:
    """The stores, opened once per process."""
    key = json.dumps([str(path.resolve()) for path in (inputs.truth, inputs.scoremaps, inputs.pseudo_masks)])
    if key not in _OPENED:
        _OPENED[key] = open_stores(inputs)
    return _OPENED[key]


def tally_some(records: Sequence[ImageRecord], inputs: Inputs) -> Tally:
    """Scores some images at every stage of their split, each read once."""
    stores = opened(inputs)
    tally = Tally.empty(len(inputs.labels) + 1, inputs.settings.threshold_bins)
    for record in records:
        truth = stores.truth.read(record.id, "mask") if record.id in stores.truth else None
        count_maps(tally, record, truth, stores.scoremaps, inputs.level)
        if record.split == "val":
            predicted = stores.predictions[record.id]
            sure = predicted["confidence"] / store.CONFIDENCE_STEPS
            counts = count(tally, "predictions", record, truth, predicted["label"], sure)
            tally.quality.append((record.id, quality_of(counts, sure, inputs)))
            continue
        refined, mask = stores.refined[record.id], stores.pseudo_masks.read(record.id, "mask")
        sure = refined["confidence"] / store.CONFIDENCE_STEPS
        count(tally, "refined", record, truth, refined["label"], sure)
        counts = count(tally, "pseudo_masks", record, truth, mask, sure)
        tally.quality.append((record.id, quality_of(counts, sure, inputs)))
    return tally


def quality_of(counts: np.ndarray | None, confidence: np.ndarray, inputs: Inputs) -> float:
    """What images are picked by: the mIoU of one image's own confusion, or its mean confidence where there is no truth."""
    if counts is None:
        return float(confidence.mean())
    return metrics.miou(counts, protocol=inputs.settings.ignored_prediction)


def count_maps(tally: Tally, record: ImageRecord, truth: np.ndarray | None, scoremaps: store.Store, level: float) -> None:
    """Adds what one image's score maps say to the tally: their winners above `level`, the winners by score (split train), and the
    method's own mask where it has a decoder. truth: u8[h,w], or None where there is none."""
    ending = "_val" if record.split == "val" else ""
    winner, best = winner_of(scoremaps, record)
    count(tally, "score_maps" + ending, record, truth, np.where(best > level, winner, 0).astype(np.uint8), best)
    decoded = scoremaps.read(record.id, "decoded")
    if decoded.size:
        count(tally, "decoder" + ending, record, truth, decoded, np.zeros(record.size, np.float32))
    if truth is not None and record.split != "val":
        bins, classes, _ = tally.histogram.shape
        tally.histogram += level_histogram(truth, winner, best, classes, bins)


def winner_of(scoremaps: store.Store, record: ImageRecord) -> tuple[np.ndarray, np.ndarray]:
    """Mask value u8[h,w] and score f32[h,w] of the best class at full size; zeros where no class is kept."""
    found = scoremaps[record.id]
    if not len(found["classes"]):
        return np.zeros(record.size, np.uint8), np.zeros(record.size, np.float32)
    full = planes.upsample(found["scores"], record.size)
    at = full.argmax(axis=0)
    return (found["classes"] + 1).astype(np.uint8)[at], np.take_along_axis(full, at[None], 0)[0]


def count(
    tally: Tally, stage: str, record: ImageRecord, truth: np.ndarray | None, label: np.ndarray, confidence: np.ndarray
) -> np.ndarray | None:
    """Adds one image's mask values u8[h,w], with a confidence f[h,w] in 0..1, to the tally; its own confusion if there is truth."""
    present = np.bincount(label.ravel(), minlength=256)
    foreground = int(label.size - present[0] - present[IGNORE])
    summed = int(np.round(confidence.sum(dtype=np.float64) * store.CONFIDENCE_STEPS))
    tally.pixels[stage] += (label.size, foreground, int(present[IGNORE]), summed)
    tally.images[stage] += 1
    tags = record.tags or ()
    tally.tags[stage] += (len(tags), sum(1 for tag in tags if not present[tag + 1]))
    if truth is None:
        return None
    counts = metrics.confusion(truth, label, len(tally.confusion[stage]))
    tally.confusion[stage] += counts
    tally.scored[stage] += 1
    return counts


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
        values.append(metrics.miou(full, protocol="background"))
    return np.array(values)


def summary(tally: Tally, inputs: Inputs, records: Records) -> dict[str, Any]:
    """metrics/<m>.json as plain values, rounded: no time, host or path."""
    names = ["background", *inputs.labels.names]
    scored = tally.scored["pseudo_masks"] + tally.scored["predictions"] > 0
    found: dict[str, Any] = {
        "truth": scored,
        "protocol": {
            "truth_255": "excluded",
            "predicted_255": inputs.settings.ignored_prediction,
            "mean": "over classes in truth or prediction, background included",
            "score_maps": "classes of the tags on train, classes the network finds on val; no CRF",
        },
        "images": {"train": len(records.split("train")), "val": len(records.split("val")), "skipped": len(records.skipped)},
        "threshold": {"chosen": inputs.level},
        "stages": {stage: _stage(tally, stage, names, inputs) for stage in STAGES if tally.images[stage]},
    }
    if not scored:
        found["note"] = "There is no ground truth: only figures that need none are given."
    for split, stage in (("train", "pseudo_masks"), ("val", "predictions")):
        if tally.scored[stage]:
            found.setdefault("everything_background", {})[split] = _everything_background(tally.confusion[stage])
    if tally.scored["score_maps"]:
        curve = threshold_curve(tally.histogram)
        best = int(np.argmax(curve))
        chosen = metrics.miou(tally.confusion["score_maps"], protocol="background")
        found["threshold"] |= {
            "oracle": best / len(curve), "miou_at_chosen": chosen, "miou_at_oracle": curve[best], "regret": max(0.0, curve[best] - chosen),
        }  # fmt: skip
    return _rounded(found)


def _everything_background(counts: np.ndarray) -> float:
    """mIoU of a prediction without any foreground: what a figure must beat to mean anything."""
    nothing = np.zeros_like(counts)
    nothing[:, 0] = counts.sum(axis=1)
    return metrics.miou(nothing, protocol="background")


def _stage(tally: Tally, stage: str, names: Sequence[str], inputs: Inputs) -> dict[str, Any]:
    size, foreground, ignored, confidence = (int(value) for value in tally.pixels[stage])
    tagged, empty = (int(value) for value in tally.tags[stage])
    found: dict[str, Any] = {
        "split": STAGES[stage],
        "images": tally.images[stage],
        "images_with_truth": tally.scored[stage],
        "coverage": foreground / size,
        "ignored": ignored / size,
        "confidence": None if stage in WITHOUT_CONFIDENCE else confidence / store.CONFIDENCE_STEPS / size,
        "tagged_classes_without_pixels": empty / tagged if tagged else None,
    }
    if tally.scored[stage]:
        counts, protocol = tally.confusion[stage], inputs.settings.ignored_prediction
        rates = metrics.rates(counts, protocol=protocol)
        found |= {name: float(np.nanmean(values)) for name, values in rates.items() if name != "iou"}
        found["miou"] = metrics.miou(counts, protocol=protocol)
        found["pixel_accuracy"] = metrics.pixel_accuracy(counts, protocol=protocol)
        found["classes"] = {name: {rate: values[at] for rate, values in rates.items()} for at, name in enumerate(names)}
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (float, np.floating)):
        return round(float(value), DIGITS) if math.isfinite(value) else None
    return value


def write_thresholds(tally: Tally, path: Path) -> None:
    """threshold.csv for `dvc plots`: mIoU of the score maps over the background level. Without truth, the header alone."""
    curve = threshold_curve(tally.histogram) if tally.scored["score_maps"] else []
    _table(path, ["threshold", "miou"], ((k / len(curve), round(value, DIGITS)) for k, value in enumerate(curve)))


def write_per_class(found: dict[str, Any], path: Path) -> None:
    """per_class.csv for `dvc plots`: IoU of the pseudo-masks."""
    classes = found["stages"].get("pseudo_masks", {}).get("classes", {})
    _table(path, ["class", "iou"], ((name, rates["iou"]) for name, rates in classes.items() if rates["iou"] is not None))


def write_confusion(tally: Tally, labels: LabelSpace, path: Path) -> None:
    """confusion.csv for `dvc plots`, whose template counts rows: one row per percent of each true class."""
    names = ["background", *labels.names]
    counts = tally.confusion["pseudo_masks"]
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
