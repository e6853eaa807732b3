"""Signs of all images → robust limits, reasons, a quality score per image, and audit/<m>.csv."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.audit.signs import SIGNS
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord

DIGITS = 5
MADS = 3.0  # robust standard deviations (1.4826 * MAD) from the median to a limit
FEWEST = 10  # images that a limit needs
STEP = 0.02  # a limit is at least this far from the median: where all images are alike, none is odd
COUNTS = {"components": 2.0}  # the same for signs that count things
LEAK = 0.01  # share of the foreground: a leak is told whatever the other images have
# The score is the plain mean of these signs, all in 0..1. Chosen on voc6, with no weight fitted: docs/audit.md. A refiner follows the
# photograph's edges, so only there do edges tell one image from another; predictions have no score maps of their own
MAPS, REFINED, PREDICTED = ("separation", "expected_iou"), ("separation", "expected_iou", "edges"), ("expected_iou",)
TERMS = {
    "score_maps": MAPS, "refined": REFINED, "pseudo_masks": REFINED, "score_maps_val": MAPS, "predictions": PREDICTED,
}  # fmt: skip
COLUMNS = ("id", "split", "stage", "tags", "truth", "miou", "score", "reasons")
PAIRS = 20  # of classes that co-occurrence names
PAIR_IMAGES = 5  # with and without the other class, that a pair needs


@dataclass(frozen=True, slots=True)
class Row:
    """One image at one stage. signs f32 in the order of SIGNS; shares (mask value, share of the image) of tagged or shown classes;
    miou, mended and spoilt (shares of the pixels) are NaN without truth."""

    id: str
    stage: str
    truth: bool
    miou: float
    mended: float
    spoilt: float
    signs: np.ndarray
    shares: tuple[tuple[int, float], ...]


def score(stage: str, signs: Mapping[str, float]) -> float:
    """Mean of the stage's TERMS that the image has, in 0..1; NaN without `expected_iou`, and for a stage that has no terms."""
    if stage not in TERMS or math.isnan(signs["expected_iou"]):
        return float("nan")
    values = [signs[term] for term in TERMS[stage] if not math.isnan(signs[term])]
    return sum(values) / len(values)


def limits(values: Iterable[float], step: float = STEP) -> tuple[float, float] | None:
    """(low, high): the median ∓ MADS robust standard deviations of the values on that side, since most signs are skewed; None for
    fewer than FEWEST finite values."""
    known = np.array([value for value in values if not math.isnan(value)], np.float64)
    if len(known) < FEWEST:
        return None
    middle = float(np.median(known))
    below, above = (float(np.median(np.abs(side - middle))) for side in (known[known <= middle], known[known >= middle]))
    return middle - max(step, MADS * 1.4826 * below), middle + max(step, MADS * 1.4826 * above)


def _odds(share: float) -> float:
    """Coverages lie evenly around their median on this scale; the ends are those of a share that can be told from 0 and 1."""
    inner = min(max(share, 0.001), 0.999)
    return math.log(inner / (1 - inner))


class Limits:
    """What is usual at each stage, learned from all rows."""

    def __init__(self, rows: Sequence[Row]) -> None:
        stages = sorted({row.stage for row in rows})
        of_stage = {stage: [row for row in rows if row.stage == stage] for stage in stages}
        table = {stage: np.stack([row.signs for row in some]).astype(np.float64) for stage, some in of_stage.items()}
        self.signs = {
            stage: {
                name: limits(table[stage][:, at], COUNTS.get(name, STEP))
                for at, (name, bad) in enumerate(SIGNS.items())
                if bad != "neither"
            }
            for stage in stages
        }
        self.medians = {
            stage: {
                name: float(np.nanmedian(table[stage][:, at]))
                for at, name in enumerate(SIGNS)
                if not np.isnan(table[stage][:, at]).all()
            }
            for stage in stages
        }
        self.coverage: dict[str, dict[int, tuple[float, float] | None]] = {}
        for stage, some in of_stage.items():
            spread: dict[int, list[float]] = {}
            for row in some:
                for value, share in row.shares:
                    if share > 0:
                        spread.setdefault(value, []).append(_odds(share))
            self.coverage[stage] = {value: limits(found) for value, found in spread.items()}

    def reasons(self, row: Row, record: ImageRecord, names: Sequence[str]) -> list[str]:
        """Short words for what is out of its limits: a sign's name, or empty:<class>, coverage:<class>."""
        signs = dict(zip(SIGNS, map(float, row.signs), strict=True))
        tags = {tag + 1 for tag in record.tags or ()}
        found = [f"empty:{names[value]}" for value, share in row.shares if value in tags and not share]
        if signs["leak"] > LEAK:
            found.append("leak")
        for value, share in row.shares:
            usual = self.coverage[row.stage].get(value)
            if usual is not None and share and not usual[0] <= _odds(share) <= usual[1]:
                found.append(f"coverage:{names[value]}")
        for name, bad in SIGNS.items():
            usual = self.signs[row.stage].get(name)
            if usual is None or name in ("empty", "leak") or math.isnan(signs[name]):
                continue
            low, high = bad in ("low", "both") and signs[name] < usual[0], bad in ("high", "both") and signs[name] > usual[1]
            if low or high:
                found.append(name)
        return found

    def as_values(self) -> dict[str, Any]:
        """stage → sign → [low, high], null on the side that is not bad."""
        return {
            stage: {
                name: [usual[0] if SIGNS[name] != "high" else None, usual[1] if SIGNS[name] != "low" else None]
                for name, usual in found.items()
                if usual is not None
            }
            for stage, found in self.signs.items()
        }


def scores(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    """(id, stage) → score; NaN where there is none."""
    return {(row.id, row.stage): score(row.stage, dict(zip(SIGNS, map(float, row.signs), strict=True))) for row in rows}


def agreement_with_truth(rows: Sequence[Row], found: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """stage → Spearman between the score and the image's own mIoU, over the images that have both."""
    told: dict[str, Any] = {}
    for stage in dict.fromkeys(row.stage for row in rows):
        pairs = [(found[row.id, stage], row.miou) for row in rows if row.stage == stage]
        pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
        if pairs:
            told[stage] = {"spearman": metrics.spearman(*zip(*pairs, strict=True)), "images": len(pairs)}
    return told


def co_occurrence(rows: Sequence[Row], records: Mapping[str, ImageRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """Of one stage: the class pairs whose mean share of the image differs most by whether the other class is tagged too, the
    PAIRS with the largest ratio first. A class that grows beside another may have taken its pixels."""
    sums: dict[tuple[int, int], list[float]] = {}
    alone: dict[int, list[float]] = {}
    for row in rows:
        tags = [tag + 1 for tag in records[row.id].tags or ()]
        share = dict(row.shares)
        for value in tags:
            total = alone.setdefault(value, [0, 0.0])
            total[0], total[1] = total[0] + 1, total[1] + share[value]
            for other in tags:
                if other != value:
                    pair = sums.setdefault((value, other), [0, 0.0])
                    pair[0], pair[1] = pair[0] + 1, pair[1] + share[value]
    found = []
    for (value, other), (count, total) in sorted(sums.items()):
        rest, without = alone[value][0] - count, alone[value][1] - total
        if count >= PAIR_IMAGES and rest >= PAIR_IMAGES:
            pair = total / count, without / rest
            strength = abs(math.log(max(pair[0], 1e-3) / max(pair[1], 1e-3)))
            found.append((strength, names[value], names[other], count, *pair))
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    keys = ("class", "with", "images", "share_with", "share_without")
    return [dict(zip(keys, one[1:], strict=True)) for one in found[:PAIRS]]


def _tags(record: ImageRecord, labels: LabelSpace) -> str:
    """`?` where nobody tagged the image; a bar within a name is written %7C."""
    return "?" if record.tags is None else "|".join(labels.names[tag].replace("|", "%7C") for tag in record.tags)


def write(
    path: Path, rows: Sequence[Row], records: Mapping[str, ImageRecord], labels: LabelSpace, learned: Limits,
    found: Mapping[tuple[str, str], float],
) -> None:  # fmt: skip
    """audit/<m>.csv: COLUMNS, then mended, spoilt and the signs; one line per row, in their order."""
    names = ["background", *(name.replace("|", "%7C") for name in labels.names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "mended", "spoilt", *SIGNS])
        for row in rows:
            record = records[row.id]
            reasons = "|".join(learned.reasons(row, record, names))
            plain = (row.miou, found[row.id, row.stage])
            numbers = (row.mended, row.spoilt, *map(float, row.signs))
            writer.writerow(
                [row.id, record.split, row.stage, _tags(record, labels), int(row.truth), *map(_number, plain), reasons,
                 *map(_number, numbers)]
            )  # fmt: skip


def _number(value: float) -> str:
    """Plain, rounded to DIGITS; nothing where there is none."""
    return "" if math.isnan(value) else f"{round(value, DIGITS):.{DIGITS}f}".rstrip("0").rstrip(".")
