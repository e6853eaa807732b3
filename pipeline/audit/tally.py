"""Every stage's result + truth → counts, and a row per image and stage. The only place that opens truth after prepare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open

from pipeline import metrics
from pipeline.audit import score, signs, truth
from pipeline.audit.score import Row
from pipeline.audit.truth import Flow, Sums
from pipeline.core import store
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Evaluate
from pipeline.imaging import planes
from pipeline.stage_order import FLOWS, LAST, STAGES

PER_ITEM = 32  # images that one process scores at a time
SMALL = 64  # px of the long side of the masks that columns are compared by; docs/audit.md says what that loses


@dataclass(frozen=True)
class Inputs:
    """Where the results lie, picklable."""

    truth: Path
    scoremaps: Path
    refined: Path
    pseudo_masks: Path
    predictions: Path
    held_out: Path
    level: float
    settings: Evaluate
    labels: LabelSpace
    root: Path


@dataclass
class Tally:
    """Sums over images, all integers, so that their order does not matter; and one small row per image and stage."""

    truth: dict[str, Sums]
    flow: dict[tuple[str, str], Flow]
    histogram: np.ndarray  # i64[bins, truth, winner]
    pixels: dict[str, np.ndarray]  # stage → i64[4]: all, foreground, ignored, summed confidence (of 255)
    tags: dict[str, np.ndarray]  # stage → i64[2]: tagged classes, those without a pixel
    images: dict[str, int]
    rows: list[Row] = field(default_factory=list)

    @staticmethod
    def empty(classes: int, bins: int) -> Tally:
        return Tally(
            truth={stage: Sums.empty(classes) for stage in STAGES},
            flow={pair: Flow.empty(classes) for pair in FLOWS},
            histogram=np.zeros((bins, classes, classes), np.int64),
            pixels={stage: np.zeros(4, np.int64) for stage in STAGES},
            tags={stage: np.zeros(2, np.int64) for stage in STAGES},
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
    truth: store.Store


def open_stores(inputs: Inputs) -> Stores:
    return Stores(
        scoremaps=store.Store(inputs.scoremaps, store.SCORE_MAPS),
        refined=store.Store(inputs.refined, store.REFINED),
        pseudo_masks=store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS),
        predictions=store.Store(inputs.predictions, store.PREDICTIONS),
        held_out=store.Store(inputs.held_out, store.HELD_OUT),
        truth=store.Store(inputs.truth, store.TRUTH),
    )


def chosen_level(refiner: Path) -> float:
    """The background level that fit_refiner found."""
    with safe_open(refiner, "np") as file:  # a learned refiner's network stays where it is
        return float(file.get_tensor("threshold")[0])


_OPENED: dict[str, Stores] = {}  # one per process


def opened(inputs: Inputs) -> Stores:
    """The stores, opened once per process."""
    key = json.dumps([str(path.resolve()) for path in (inputs.truth, inputs.scoremaps, inputs.pseudo_masks)])
    if key not in _OPENED:
        _OPENED[key] = open_stores(inputs)
    return _OPENED[key]


Counted = tuple[Tally, list[store.Item]]


def tally_some(records: Sequence[ImageRecord], inputs: Inputs) -> Counted:
    """Scores some images at every stage of their split, each read once; and SMALL_MASKS items of them."""
    stores = opened(inputs)
    tally = Tally.empty(len(inputs.labels) + 1, inputs.settings.threshold_bins)
    small = []
    for record in records:
        image = _Image(record, inputs, stores, tally)
        image.count()
        last = image.labels[LAST[record.split]]
        small.append((record.id, {"mask": planes.nearest(last, planes.fitted(record.size, SMALL))}))
    return tally, small


def gathered(counted: Iterable[Counted], tally: Tally) -> Iterator[store.Item]:
    """Passes on the SMALL_MASKS items of all images in their order, and adds the counts to `tally` on the way."""
    for some, small in counted:
        tally.add(some)
        yield from small


class _Image:
    """One image on its way through the stages; its counts go to `tally`."""

    def __init__(self, record: ImageRecord, inputs: Inputs, stores: Stores, tally: Tally) -> None:
        self.record, self.inputs, self.stores, self.tally = record, inputs, stores, tally
        self.truth: truth.Truth | None = None
        if record.id in stores.truth:
            self.truth = truth.read(stores.truth.read(record.id, "mask"))
            self.weights = metrics.poisson_weights(record.id)
        tags = None if record.tags is None else tuple(tag + 1 for tag in record.tags)
        self.seen = signs.Seen(tags, signs.edge_ranks(read_image(record, inputs.root)))
        self.labels: dict[str, np.ndarray] = {}  # of the stages so far
        self.miou: dict[str, float] = {}

    def count(self) -> None:
        """The stages of the image's split, in the order of the pipeline."""
        record, stores = self.record, self.stores
        self._maps("_val" if record.split == "val" else "")
        if record.split == "val":
            predicted = stores.predictions[record.id]
            self._stage("predictions", predicted["label"], predicted["confidence"])
            return
        refined, mask = stores.refined[record.id], stores.pseudo_masks.read(record.id, "mask")
        self._stage("refined", refined["label"], refined["confidence"])
        self._stage("pseudo_masks", mask, refined["confidence"])

    def _maps(self, ending: str) -> None:
        """The winners of the score maps above the level, the winners by score (split train), and the method's own mask where it has
        a decoder."""
        record, level = self.record, self.inputs.level
        found = self.stores.scoremaps[record.id]
        winner, best, total = winner_of(found, record)
        label = np.where(best > level, winner, 0).astype(np.uint8)
        sure = np.maximum(best, level) / np.maximum(total + level, 1e-6)
        self.maps = signs.of_maps(
            found["scores"].astype(np.float32), found["classes"], found["tag_logits"], found["agreement"], level
        )
        summed = int(np.round(best.sum(dtype=np.float64) * store.CONFIDENCE_STEPS))
        self._stage("score_maps" + ending, label, np.round(sure * store.CONFIDENCE_STEPS).astype(np.uint8), summed)
        if found["decoded"].size:
            self._stage("decoder" + ending, found["decoded"], None, 0)
        if self.truth is not None and record.split != "val":
            bins, classes, _ = self.tally.histogram.shape
            self.tally.histogram += metrics.level_histogram(self.truth.mask, winner, best, classes, bins)

    def _stage(self, stage: str, label: np.ndarray, confidence: np.ndarray | None, summed: int | None = None) -> None:
        """Mask values u8[h,w] and how sure they are, u8[h,w] of 255. summed: of the confidence that is told, where it is another."""
        tally, record = self.tally, self.record
        present = np.bincount(label.ravel(), minlength=256)
        foreground = int(label.size - present[0] - present[IGNORE])
        if summed is None:
            summed = 0 if confidence is None else int(confidence.sum(dtype=np.int64))
        tally.pixels[stage] += (label.size, foreground, int(present[IGNORE]), summed)
        tally.images[stage] += 1
        tags = record.tags or ()
        tally.tags[stage] += (len(tags), sum(1 for tag in tags if not present[tag + 1]))
        before = next((earlier for earlier, later in FLOWS if later == stage and earlier in self.labels), None)
        same = before is not None and stage == "pseudo_masks" and np.array_equal(label, self.labels[before])
        if not same:  # export mostly changes nothing
            self.signs = signs.of_mask(label, confidence, self.seen)
            self.signs |= self.maps if stage != "predictions" else {}
        self.signs["agreement"] = signs.NONE if before is None else signs.agreement(self.labels[before], label)
        self.signs |= self._held_out(stage)
        self.labels[stage] = label
        mended, spoilt = (
            (signs.NONE, signs.NONE) if self.truth is None else self._truth(stage, before, same, label, confidence)
        )
        tally.rows.append(
            Row(
                record.id, stage, self.truth is not None, self.miou.get(stage, signs.NONE), mended, spoilt,
                np.array([self.signs[name] for name in signs.SIGNS], np.float32), signs.shares(label, self.seen.tags),
            )
        )  # fmt: skip

    def _held_out(self, stage: str) -> dict[str, float]:
        """The signs of cross_validate, which are of the pseudo-mask; none where it is off."""
        if stage != "pseudo_masks" or self.record.id not in self.stores.held_out:
            return {}
        found = self.stores.held_out[self.record.id]
        return {"held_out": float(found["soft_min"][0]), "held_out_agreement": float(found["agreement"][0])}

    def _truth(
        self, stage: str, before: str | None, same: bool, label: np.ndarray, confidence: np.ndarray | None
    ) -> tuple[float, float]:
        """Counts one stage against the truth; the shares of the image's pixels that it mended and spoilt."""
        assert self.truth is not None
        protocol, classes = self.inputs.settings.ignored_prediction, len(self.inputs.labels) + 1
        if not same:
            self.counts = truth.count(self.truth, label, confidence, classes, protocol)
        self.tally.truth[stage].count(self.counts, self.weights, protocol)
        self.miou[stage] = self.counts.miou(protocol)
        if before is None:
            return signs.NONE, signs.NONE
        pixels = truth.moved(self.truth.mask, self.labels[before], label, classes, protocol)
        self.tally.flow[before, stage].count(pixels, self.miou[before], self.miou[stage])
        total = int(pixels[2].sum())
        return (int(pixels[0].sum()) / total, int(pixels[1].sum()) / total) if total else (signs.NONE, signs.NONE)


def winner_of(found: Mapping[str, np.ndarray], record: ImageRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """SCORE_MAPS fields → mask value u8[h,w] and score f32[h,w] of the best class at full size, and the sum of all scores; zeros
    where no class is kept."""
    if not len(found["classes"]):
        nothing = np.zeros(record.size, np.float32)
        return np.zeros(record.size, np.uint8), nothing, nothing
    full = planes.upsample(found["scores"], record.size)
    at = full.argmax(axis=0)
    return (found["classes"] + 1).astype(np.uint8)[at], np.take_along_axis(full, at[None], 0)[0], full.sum(axis=0)


@dataclass(frozen=True)
class Audited:
    """A column's whole tally, and what only all of its images together say; `audited` makes it once.

    rows   by id, then by stage in the order of STAGES
    scores (id, stage) → label-free quality
    curve  f64[bins] mIoU of the score maps over the background level; empty without truth
    """

    tally: Tally
    rows: Sequence[Row]
    limits: score.Limits
    scores: Mapping[tuple[str, str], float]
    curve: np.ndarray

    @property
    def quality(self) -> dict[str, float]:
        """id → own mIoU of the image's last mask; without truth, that mask's score."""
        last = (row for row in self.rows if row.stage in LAST.values())
        return {row.id: row.miou if row.truth else self.scores[row.id, row.stage] for row in last}


def audited(tally: Tally) -> Audited:
    """Of all images; neither their order nor that of `tally.rows` matters."""
    place = {stage: at for at, stage in enumerate(STAGES)}
    rows = sorted(tally.rows, key=lambda row: (row.id, place[row.stage]))
    curve = metrics.threshold_curve(tally.histogram) if tally.truth["score_maps"].images else np.zeros(0)
    return Audited(tally, rows, score.Limits(rows), score.scores(rows), curve)
