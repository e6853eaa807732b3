"""Quality indicators of all images → robust limits, reasons, a quality score per image, and audit/<run>.csv."""

from __future__ import annotations

import csv
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.audit.indicators import INDICATORS
from pipeline.audit.row_table import Row, RowTable
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord

DIGITS = 5
DEVIATIONS = 3.0  # robust standard deviations (1.4826 * MAD) from the median to a limit
MIN_IMAGES = 10  # that a limit needs
MIN_DISTANCE = 0.02  # of a limit from the median: where all images are alike, none is an outlier
COUNT_DISTANCES = {"components": 2.0}  # the same for indicators that count things
MAX_LEAK = 0.01  # fraction of the foreground: a larger leak is a reason whatever the other images have
# The score is the plain mean of these indicators, all in 0..1. Chosen on voc6, with no weight fitted: docs/audit.md. A
# refiner follows the photograph's edges, so only after it do edges order the images; predictions have no score maps
MAP_TERMS = ("separation", "expected_iou")
REFINED_TERMS = ("separation", "expected_iou", "edges")
PREDICTION_TERMS = ("expected_iou",)
TERMS = {
    "score_maps": MAP_TERMS, "refined": REFINED_TERMS, "pseudo_masks": REFINED_TERMS, "score_maps_val": MAP_TERMS,
    "predictions": PREDICTION_TERMS, "relabelled": PREDICTION_TERMS,
}  # fmt: skip
COLUMNS = ("id", "split", "stage", "tags", "truth", "miou", "score", "reasons")
MAX_PAIRS = 20  # of classes that co-occurrence names
MIN_PAIR_IMAGES = 5  # with and without the other class, that a pair needs


def score(stage: str, indicators: Mapping[str, float]) -> float:
    """Mean of the stage's TERMS that the image has, 0..1; NaN without `expected_iou`, and for a stage that has no terms."""
    if stage not in TERMS or math.isnan(indicators["expected_iou"]):
        return float("nan")
    values = [indicators[term] for term in TERMS[stage] if not math.isnan(indicators[term])]
    return sum(values) / len(values)


def limits(values: Sequence[float] | np.ndarray, min_distance: float = MIN_DISTANCE) -> tuple[float, float] | None:
    """(low, high): the median ∓ DEVIATIONS robust standard deviations, each of the values on that side of the median.

    Two-sided, since most indicators are skewed. NaN does not count; None for fewer than MIN_IMAGES other values.
    """
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    if len(known) < MIN_IMAGES:
        return None
    median = float(np.median(known))
    sides = (known[known <= median], known[known >= median])
    below, above = (DEVIATIONS * 1.4826 * float(np.median(np.abs(side - median))) for side in sides)
    return median - max(min_distance, below), median + max(min_distance, above)


def _log_odds(share: float) -> float:
    """On this scale coverages are spread evenly around their median. Clips shares to 0.001..0.999, to be finite."""
    inner = min(max(share, 0.001), 0.999)
    return math.log(inner / (1 - inner))


class Limits:
    """What is usual at each stage, estimated from the rows of all images.

    indicators  stage → indicator → (low, high), or None where too few images have it
    medians     stage → indicator → median over the images that have it
    coverage    stage → mask value → (low, high) of the log odds of the class's share of the image, where it has pixels
    """

    def __init__(self, rows: RowTable) -> None:
        stages = sorted(rows.stages)
        tables = {stage: rows.column("indicators", stage) for stage in stages}
        self.indicators = {
            stage: {
                name: limits(table[:, at].astype(np.float64), COUNT_DISTANCES.get(name, MIN_DISTANCE))
                for at, (name, bad_side) in enumerate(INDICATORS.items())
                if bad_side != "neither"
            }
            for stage, table in tables.items()
        }
        self.medians = {
            stage: {
                name: float(np.nanmedian(table[:, at].astype(np.float64)))
                for at, name in enumerate(INDICATORS)
                if not np.isnan(table[:, at]).all()
            }
            for stage, table in tables.items()
        }
        self.coverage = {stage: _coverage_limits(rows.shares(stage)) for stage in stages}

    def reasons(self, row: Row, record: ImageRecord, names: Sequence[str]) -> list[str]:
        """What of a row is out of its limits: an indicator's name, or empty:<class>, coverage:<class>.

        names: of mask values, background first.
        """
        indicators = row.by_name()
        tags = {tag + 1 for tag in record.tags or ()}
        reasons = [f"empty:{names[value]}" for value, share in row.shares if value in tags and not share]
        if indicators["leak"] > MAX_LEAK:
            reasons.append("leak")
        for value, share in row.shares:
            usual = self.coverage[row.stage].get(value)
            if usual is not None and share and not usual[0] <= _log_odds(share) <= usual[1]:
                reasons.append(f"coverage:{names[value]}")
        for name, bad_side in INDICATORS.items():
            usual = self.indicators[row.stage].get(name)
            if usual is None or name in ("empty", "leak") or math.isnan(indicators[name]):
                continue
            too_low = bad_side in ("low", "both") and indicators[name] < usual[0]
            too_high = bad_side in ("high", "both") and indicators[name] > usual[1]
            if too_low or too_high:
                reasons.append(name)
        return reasons

    def as_values(self) -> dict[str, Any]:
        """stage → indicator → [low, high], null on the side that is not bad."""
        return {
            stage: {
                name: [usual[0] if INDICATORS[name] != "high" else None, usual[1] if INDICATORS[name] != "low" else None]
                for name, usual in of_stage.items()
                if usual is not None
            }
            for stage, of_stage in self.indicators.items()
        }


def _coverage_limits(shares: Iterable[tuple[int, float]]) -> dict[int, tuple[float, float] | None]:
    """(mask value, share) of one stage → mask value → `limits` of the log odds of its shares, where it has pixels."""
    log_odds: dict[int, array[float]] = {}
    for value, share in shares:
        if share > 0:
            log_odds.setdefault(value, array("d")).append(_log_odds(share))
    return {value: limits(of_class) for value, of_class in log_odds.items()}


def scores(rows: Iterable[Row]) -> np.ndarray:
    """f64[n]: score of every row, 0..1; NaN where there is none."""
    return np.fromiter((score(row.stage, row.by_name()) for row in rows), np.float64)


def score_correlation(rows: RowTable, quality: np.ndarray) -> dict[str, Any]:
    """stage → Spearman's rank correlation of the score with the image's own mIoU, and the number of images that have both.

    quality: score of every row, from `scores`.
    """
    correlation: dict[str, Any] = {}
    for stage in rows.stages:
        scored, miou = quality[rows.is_of(stage)], rows.column("miou", stage)
        both = ~(np.isnan(scored) | np.isnan(miou))
        if both.any():
            correlation[stage] = {"spearman": metrics.spearman(scored[both], miou[both]), "images": int(both.sum())}
    return correlation


def co_occurrence(rows: Iterable[Row], records: Mapping[str, ImageRecord], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of one stage → the class pairs for which a class's mean share of the image depends most on the other's tag.

    share_with is the mean over the class's images in which the other class is tagged too, share_without that over the rest.
    At most MAX_PAIRS, by the ratio of the two, the largest first; names: of mask values, background first. A class that is
    larger beside another may have taken its pixels.
    """
    pair_sums: dict[tuple[int, int], list[float]] = {}
    class_sums: dict[int, list[float]] = {}
    for row in rows:
        tags = [tag + 1 for tag in records[row.id].tags or ()]
        share = dict(row.shares)
        for value in tags:
            total = class_sums.setdefault(value, [0, 0.0])
            total[0], total[1] = total[0] + 1, total[1] + share[value]
            for other in tags:
                if other != value:
                    pair = pair_sums.setdefault((value, other), [0, 0.0])
                    pair[0], pair[1] = pair[0] + 1, pair[1] + share[value]
    pairs = []
    for (value, other), (count, total) in sorted(pair_sums.items()):
        rest, without = class_sums[value][0] - count, class_sums[value][1] - total
        if count >= MIN_PAIR_IMAGES and rest >= MIN_PAIR_IMAGES:
            means = total / count, without / rest
            strength = abs(math.log(max(means[0], 1e-3) / max(means[1], 1e-3)))
            pairs.append((strength, names[value], names[other], count, *means))
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    keys = ("class", "with", "images", "share_with", "share_without")
    return [dict(zip(keys, pair[1:], strict=True)) for pair in pairs[:MAX_PAIRS]]


def _tags(record: ImageRecord, labels: LabelSpace) -> str:
    """`?` where nobody tagged the image; a bar within a name is written %7C."""
    return "?" if record.tags is None else "|".join(labels.names[tag].replace("|", "%7C") for tag in record.tags)


def write(
    path: Path, rows: RowTable, records: Mapping[str, ImageRecord], labels: LabelSpace, usual: Limits, quality: np.ndarray,
) -> None:  # fmt: skip
    """audit/<run>.csv: COLUMNS, then corrected, broken and the indicators; a line per row, in their order.

    quality: score of every row, from `scores`.
    """
    names = ["background", *(name.replace("|", "%7C") for name in labels.names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, "corrected", "broken", *INDICATORS])
        for row, scored in zip(rows, quality, strict=True):
            record = records[row.id]
            reasons = "|".join(usual.reasons(row, record, names))
            plain = (row.miou, scored)
            numbers = (row.corrected, row.broken, *map(float, row.indicators))
            writer.writerow(
                [row.id, record.split, row.stage, _tags(record, labels), int(row.truth), *map(_number, plain), reasons,
                 *map(_number, numbers)]
            )  # fmt: skip


def _number(value: float) -> str:
    """Plain, rounded to DIGITS; nothing where there is none."""
    return "" if math.isnan(value) else f"{round(value, DIGITS):.{DIGITS}f}".rstrip("0").rstrip(".")
