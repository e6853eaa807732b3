"""Results of all stages + truth → counts, and a row per image and stage. Nothing else opens truth after prepare."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open

from pipeline import metrics
from pipeline.audit import empty_masks, indicators, score, truth
from pipeline.audit.indicators import INDICATORS, UNDEFINED
from pipeline.audit.row_table import Row, RowTable
from pipeline.audit.truth import Flow, StageCounts
from pipeline.core import overlap, store
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Evaluate
from pipeline.imaging import planes
from pipeline.stage_order import FLOWS, LAST, STAGES

OF_SEGMENTER = ("predictions", "relabelled")  # indicators of score maps say nothing of these masks
BATCH = 32  # images that a process scores at a time
SMALL_SIDE = 64  # px of the long side of SMALL_MASKS; docs/audit.md has what that costs in method agreement


@dataclass(frozen=True)
class Inputs:
    """Where the results of a run lie, and how to score them; picklable.

    threshold  0..1 of the score maps, fitted by fit_refiner: below it a score is background
    root       folder that paths of records start from
    loaders    threads that decode images ahead
    """

    truth: Path
    scoremaps: Path
    refined: Path
    pseudo_masks: Path
    predictions: Path
    held_out: Path
    relabelled: Path
    threshold: float
    settings: Evaluate
    labels: LabelSpace
    root: Path
    loaders: int = 0


@dataclass
class Tally:
    """Sums over images, all integers, so that their order does not matter; and a row per image and stage.

    truth      stage → counts against the truth
    flow       (stage before, stage) → what the stage changed
    histogram  i64[bins, c, c] of the score maps of split train: `metrics.score_histogram`
    pixels     stage → i64[4] all, foreground, ignored, sum of confidences (of 255)
    tags       stage → i64[c - 1, 2] images with the class as a tag, those of them without a pixel of it
    images     stage → images that have it
    rows       of a batch of images each
    """

    truth: dict[str, StageCounts]
    flow: dict[tuple[str, str], Flow]
    histogram: np.ndarray
    pixels: dict[str, np.ndarray]
    tags: dict[str, np.ndarray]
    images: dict[str, int]
    rows: list[RowTable] = field(default_factory=list)

    @staticmethod
    def empty(classes: int, bins: int) -> Tally:
        """classes includes background; bins: thresholds in 0..1 that the score maps are scored at."""
        return Tally(
            truth={stage: StageCounts.empty(classes) for stage in STAGES},
            flow={pair: Flow.empty(classes) for pair in FLOWS},
            histogram=np.zeros((bins, classes, classes), np.int64),
            pixels={stage: np.zeros(4, np.int64) for stage in STAGES},
            tags={stage: np.zeros((classes - 1, 2), np.int64) for stage in STAGES},
            images=dict.fromkeys(STAGES, 0),
        )

    def add(self, other: Tally) -> None:
        for stage in STAGES:
            self.truth[stage].add(other.truth[stage])
            self.pixels[stage] += other.pixels[stage]
            self.tags[stage] += other.tags[stage]
            self.images[stage] += other.images[stage]
        for pair in FLOWS:
            self.flow[pair].add(other.flow[pair])
        self.histogram += other.histogram
        self.rows += other.rows


@dataclass(frozen=True)
class Stores:
    scoremaps: store.Store
    refined: store.Store
    pseudo_masks: store.Store
    predictions: store.Store
    held_out: store.Store
    relabelled: store.Store
    truth: store.Store


def open_stores(inputs: Inputs) -> Stores:
    return Stores(
        scoremaps=store.Store(inputs.scoremaps, store.SCORE_MAPS),
        refined=store.Store(inputs.refined, store.REFINED),
        pseudo_masks=store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS),
        predictions=store.Store(inputs.predictions, store.PREDICTIONS),
        held_out=store.Store(inputs.held_out, store.HELD_OUT),
        relabelled=store.Store(inputs.relabelled, store.RELABELLED),
        truth=store.Store(inputs.truth, store.TRUTH),
    )


def fitted_threshold(refiner: Path) -> float:
    """refiner.safetensors → the threshold of the score maps that fit_refiner chose, 0..1."""
    with safe_open(refiner, "np") as file:  # a learned refiner's network stays where it is
        return float(file.get_tensor("threshold")[0])


_STORES: dict[str, Stores] = {}  # by the paths of inputs


def cached_stores(inputs: Inputs) -> Stores:
    """The stores, opened once per process."""
    key = json.dumps([str(path.resolve()) for path in (inputs.truth, inputs.scoremaps, inputs.pseudo_masks)])
    if key not in _STORES:
        _STORES[key] = open_stores(inputs)
    return _STORES[key]


BatchTally = tuple[Tally, list[store.Item]]


def tally_batch(records: Sequence[ImageRecord], inputs: Inputs) -> BatchTally:
    """Scores a batch of images at every stage of their split, each result read once; and their SMALL_MASKS items."""
    stores = cached_stores(inputs)
    tally = Tally.empty(len(inputs.labels) + 1, inputs.settings.threshold_bins)
    small_masks, rows = [], list[Row]()
    with closing(photographs(records, inputs)) as decoded:
        for record, photograph in zip(records, decoded, strict=True):
            image = _ImageTally(record, photograph, inputs, stores, tally)
            image.count()
            rows += image.rows
            mask = image.labels[LAST[record.split]]
            small_masks.append((record.id, {"mask": planes.nearest(mask, planes.fitted(record.size, SMALL_SIDE))}))
    tally.rows.append(RowTable.of(rows))
    return tally, small_masks


def photographs(records: Sequence[ImageRecord], inputs: Inputs) -> Generator[np.ndarray, None, None]:
    """u8[h,w,3] of every record, decoded ahead by inputs.loaders threads, so that no image waits for the disk."""
    return overlap.ahead(partial(read_image, root=inputs.root), records, inputs.loaders, inputs.loaders)


def add_batches(batches: Iterable[BatchTally], total: Tally) -> Iterator[store.Item]:
    """Adds the tallies of all batches to `total` as it yields their SMALL_MASKS items, in order."""
    for tally, small_masks in batches:
        total.add(tally)
        yield from small_masks


class _ImageTally:
    """Scores one image u8[h,w,3] stage by stage; its counts go to `tally`."""

    def __init__(self, record: ImageRecord, photograph: np.ndarray, inputs: Inputs, stores: Stores, tally: Tally) -> None:
        self.record, self.inputs, self.stores, self.tally = record, inputs, stores, tally
        self.truth: truth.Truth | None = None
        if record.id in stores.truth:
            self.truth = truth.with_bands(stores.truth.read(record.id, "mask"))
            self.weights = metrics.poisson_weights(record.id)
        tags = None if record.tags is None else tuple(tag + 1 for tag in record.tags)
        self.context = indicators.ImageContext(tags, indicators.edge_ranks(photograph))
        self.labels: dict[str, np.ndarray] = {}  # mask values u8[h,w] of the stages so far
        self.miou: dict[str, float] = {}
        self.rows: list[Row] = []

    def count(self) -> None:
        """The stages of the image's split, in the order of the pipeline."""
        record, stores = self.record, self.stores
        self._count_score_maps("_val" if record.split == "val" else "")
        if record.split == "val":
            prediction = stores.predictions[record.id]
            self._count_stage("predictions", prediction["label"], prediction["confidence"])
            return
        refined, mask = stores.refined[record.id], stores.pseudo_masks.read(record.id, "mask")
        self._count_stage("refined", refined["label"], refined["confidence"])
        self._count_stage("pseudo_masks", mask, refined["confidence"])
        if record.id in stores.relabelled:
            label, confidence = (stores.relabelled.read(record.id, name) for name in ("label", "confidence"))
            self._count_stage("relabelled", label, confidence)

    def _count_score_maps(self, ending: str) -> None:
        """Stages score_maps and, where the method has a decoder, decoder; `ending` is _val on split val.

        The confidence of a score map's pixel is the larger of threshold and best score over the sum of threshold and all
        scores; audit/<run>.json has the mean of the best score instead.
        """
        record, threshold = self.record, self.inputs.threshold
        fields = self.stores.scoremaps[record.id]
        winner, best, total = winning_class(fields, record)
        label = np.where(best > threshold, winner, 0).astype(np.uint8)
        confidence = np.maximum(best, threshold) / np.maximum(total + threshold, 1e-6)
        self.map_indicators = indicators.score_map_indicators(
            fields["scores"].astype(np.float32), fields["classes"], fields["tag_logits"], fields["agreement"], threshold
        )
        best_sum = int(np.round(best.sum(dtype=np.float64) * store.CONFIDENCE_STEPS))
        steps = np.round(confidence * store.CONFIDENCE_STEPS).astype(np.uint8)
        self._count_stage("score_maps" + ending, label, steps, best_sum)
        if fields["decoded"].size:
            self._count_stage("decoder" + ending, fields["decoded"], None, 0)
        if self.truth is not None and record.split != "val":
            bins, classes, _ = self.tally.histogram.shape
            self.tally.histogram += metrics.score_histogram(self.truth.mask, winner, best, classes, bins)

    def _count_stage(
        self, stage: str, label: np.ndarray, confidence: np.ndarray | None, confidence_sum: int | None = None
    ) -> None:
        """Mask values u8[h,w] and their confidence u8[h,w] (of 255).

        confidence_sum: over the image, where the mean confidence of the stage is not that of `confidence`.
        """
        tally, record = self.tally, self.record
        present = np.bincount(label.ravel(), minlength=256)
        foreground = int(label.size - present[0] - present[IGNORE])
        if confidence_sum is None:
            confidence_sum = 0 if confidence is None else int(confidence.sum(dtype=np.int64))
        tally.pixels[stage] += (label.size, foreground, int(present[IGNORE]), confidence_sum)
        tally.images[stage] += 1
        tally.tags[stage] += empty_masks.counts(record.tags or (), present, len(self.inputs.labels))
        before = next((earlier for earlier, later in FLOWS if later == stage and earlier in self.labels), None)
        same = before is not None and stage == "pseudo_masks" and np.array_equal(label, self.labels[before])
        if not same:  # export mostly changes nothing
            self.indicators = indicators.mask_indicators(label, confidence, self.context)
            self.indicators |= self.map_indicators if stage not in OF_SEGMENTER else {}
        self.indicators["stage_agreement"] = (
            UNDEFINED if before is None else indicators.mask_miou(self.labels[before], label)
        )
        self.indicators |= self._held_out(stage)
        self.labels[stage] = label
        corrected, broken = UNDEFINED, UNDEFINED
        if self.truth is not None:
            corrected, broken = self._count_truth(stage, before, same, label, confidence)
        values = np.array([self.indicators[name] for name in INDICATORS], np.float32)
        shares = indicators.class_shares(label, self.context.tags)
        miou = self.miou.get(stage, UNDEFINED)
        self.rows.append(Row(record.id, stage, self.truth is not None, miou, corrected, broken, values, shares))

    def _held_out(self, stage: str) -> dict[str, float]:
        """Indicators from cross_validate, which are of the pseudo-mask; none where it is off."""
        if stage != "pseudo_masks" or self.record.id not in self.stores.held_out:
            return {}
        fields = self.stores.held_out[self.record.id]
        return {
            "held_out": float(fields["soft_min"][0]),
            "held_out_agreement": float(fields["held_out_agreement"][0]),
        }

    def _count_truth(
        self, stage: str, before: str | None, same: bool, label: np.ndarray, confidence: np.ndarray | None
    ) -> tuple[float, float]:
        """Counts one stage against the truth; the fractions of the image's pixels that it corrected and broke, NaN without a
        stage before. same: the mask is that of `before`."""
        assert self.truth is not None
        protocol, classes = self.inputs.settings.ignored_prediction, len(self.inputs.labels) + 1
        if not same:
            self.counts = truth.count(self.truth, label, confidence, classes, protocol)
        self.tally.truth[stage].count(self.counts, self.weights, protocol)
        self.miou[stage] = self.counts.miou(protocol)
        if before is None:
            return UNDEFINED, UNDEFINED
        pixels = truth.changed_pixels(self.truth.mask, self.labels[before], label, classes, protocol)
        self.tally.flow[before, stage].count(pixels, self.miou[before], self.miou[stage])
        total = int(pixels[2].sum())
        return (int(pixels[0].sum()) / total, int(pixels[1].sum()) / total) if total else (UNDEFINED, UNDEFINED)


def winning_class(fields: Mapping[str, np.ndarray], record: ImageRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SCORE_MAPS fields → mask value u8[h,w] and score f32[h,w] of the best class, and the sum of all scores f32[h,w].

    At the image's size; zeros where no class is kept.
    """
    if not len(fields["classes"]):
        zeros = np.zeros(record.size, np.float32)
        return np.zeros(record.size, np.uint8), zeros, zeros
    full = planes.upsample(fields["scores"], record.size)
    at = full.argmax(axis=0)
    return (fields["classes"] + 1).astype(np.uint8)[at], np.take_along_axis(full, at[None], 0)[0], full.sum(axis=0)


@dataclass(frozen=True)
class RunAudit:
    """The tally of all images of a run, and what follows from all of them together.

    rows    of all images
    limits  of the indicators, by stage
    scores  f64[n] label-free quality score of every row, 0..1 or NaN
    curve   f64[bins] mIoU of the score maps over the threshold; empty without truth
    """

    tally: Tally
    rows: RowTable
    limits: score.Limits
    scores: np.ndarray
    curve: np.ndarray

    @property
    def quality(self) -> np.ndarray:
        """f64[images] by id: own mIoU of the image's mask at the LAST stage; without truth, the score of that mask."""
        last = np.logical_or.reduce([self.rows.is_of(stage) for stage in LAST.values()])
        columns = self.rows.columns
        return np.where(columns["truth"], columns["miou"], self.scores)[last]


def audit_of(tally: Tally) -> RunAudit:
    """tally: of all images of a run, added in any order; its rows move to the audit."""
    rows = RowTable.joined(tally.rows)
    curve = metrics.threshold_curve(tally.histogram) if tally.truth["score_maps"].images else np.zeros(0)
    return RunAudit(tally, rows, score.Limits(rows), score.scores(rows), curve)
