"""Audit of a run → audit/<run>.json and its headline metrics/<run>.json, as plain values."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline import metrics, metrics_file
from pipeline.audit import empty_masks, score, truth
from pipeline.audit.tally import Inputs, RunAudit, Tally
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.stage_order import LAST, SPLIT_OF, STAGES

DIGITS = 5
WITHOUT_CONFIDENCE = ("decoder", "decoder_val")


def summary(audit: RunAudit, inputs: Inputs, records: Records, records_digest: str) -> dict[str, Any]:
    """Content of audit/<run>.json: numbers rounded to DIGITS, null for what is not finite; no time, host or path.

    records_digest: sha256 of records.h5, by which the report knows a run of other data.
    """
    tally, names = audit.tally, ["background", *inputs.labels.names]
    scored = any(tally.truth[stage].images for stage in LAST.values())
    figures: dict[str, Any] = metrics_file.HEADER | {
        "truth": scored,
        "protocol": {
            "truth_255": "excluded",
            "predicted_255": inputs.settings.ignored_prediction,
            "mean": "over classes in truth or prediction, background included",
            "score_maps": "classes of the tags on train, classes the network finds on val; no CRF",
        },
        "data": {
            "records": records_digest,
            "ids": store.digest([record.id for record in records]),
            "classes": store.digest(records.labels.names),
        },
        "images": {"train": len(records.split("train")), "val": len(records.split("val")), "skipped": len(records.skipped)},
        "threshold": {"chosen": inputs.threshold},
        "stages": {stage: _stage(tally, stage, names, inputs) for stage in STAGES if tally.images[stage]},
    }
    for stage, fraction in _with_reasons(audit, records, names).items():
        figures["stages"][stage]["with_reasons"] = fraction
    if (corrections := inputs.pseudo_masks / store.CORRECTED).is_file():
        figures["corrected_by_hand"] = json.loads(corrections.read_text(encoding="utf-8"))["corrected"]
    if (empty := empty_masks.finding(tally.tags[LAST["train"]], inputs.labels.names, LAST["train"])) is not None:
        figures["empty_masks"] = empty
    if not scored:
        figures["note"] = "There is no ground truth: only figures that need none are given."
    for split, stage in LAST.items():
        if tally.truth[stage].images:
            figures.setdefault("background_only", {})[split] = _background_only(tally.truth[stage].confusion)
    if len(audit.curve):
        best = int(np.argmax(audit.curve))
        chosen, oracle = metrics.miou(tally.truth["score_maps"].confusion, protocol="background"), audit.curve[best]
        figures["threshold"] |= {
            "oracle": best / len(audit.curve), "miou_at_chosen": chosen, "miou_at_oracle": oracle,
            "regret": max(0.0, oracle - chosen),
        }  # fmt: skip
    return _rounded(figures | _figures_of_rows(audit, records, names))


def headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Content of metrics/<run>.json, few enough for the columns of `dvc exp show`; docs/metrics.md lists its keys.

    figures: from `summary`. What a run lacks, as figures that need ground truth where there is none, is left out.
    """
    stages, score_of = figures["stages"], figures.get("score", {})
    values = {
        "version": metrics_file.VERSION,
        "supervision": figures.get("supervision"),
        "miou": metrics_file.mious(figures),
        "regret": figures["threshold"].get("regret"),
        "score_correlation": {stage: score_of[stage]["spearman"] for stage in LAST.values() if stage in score_of},
        "coverage": {stage: stages[stage]["coverage"] for stage in LAST.values() if stage in stages},
        "tagged_classes_without_pixels": stages.get(LAST["train"], {}).get("tagged_classes_without_pixels"),
        "with_reasons": {stage: stages[stage]["with_reasons"] for stage in LAST.values() if stage in stages},
    }
    return {name: value for name, value in values.items() if value is not None and value != {}}


def _with_reasons(audit: RunAudit, records: Records, names: Sequence[str]) -> dict[str, float]:
    """Stage → fraction of its images that have a reason for review."""
    by_id, counts = records.by_id(), Counter[str]()
    for row in audit.rows:
        counts[row.stage] += bool(audit.limits.reasons(row, by_id[row.id], names))
    return {stage: count / audit.tally.images[stage] for stage, count in counts.items()}


def _figures_of_rows(audit: RunAudit, records: Records, names: Sequence[str]) -> dict[str, Any]:
    """Flow between stages, medians and limits of indicators, co-occurrence, and the score's correlation with the mIoU."""
    figures: dict[str, Any] = {
        "flow": [{"from": a, "to": b, **flow.as_values(names)} for (a, b), flow in audit.tally.flow.items() if flow.images],
        "indicators": {stage: audit.limits.medians[stage] for stage in STAGES if stage in audit.limits.medians},
        "limits": audit.limits.as_values(),
        "co_occurrence": score.co_occurrence(audit.rows.of_stage(LAST["train"]), records.by_id(), names),
    }
    correlation = score.score_correlation(audit.rows, audit.scores)
    return figures | ({"score": correlation} if correlation else {})


def _background_only(counts: np.ndarray) -> float:
    """Confusion i64[c,c+1] → mIoU of a prediction of background everywhere, the baseline of any method."""
    background = np.zeros_like(counts)
    background[:, 0] = counts.sum(axis=1)
    return metrics.miou(background, protocol="background")


def _stage(tally: Tally, stage: str, names: Sequence[str], inputs: Inputs) -> dict[str, Any]:
    size, foreground, ignored, confidence = (int(value) for value in tally.pixels[stage])
    tagged, empty = (int(value) for value in tally.tags[stage].sum(axis=0))
    figures: dict[str, Any] = {
        "split": SPLIT_OF[stage],
        "images": tally.images[stage],
        "images_with_truth": tally.truth[stage].images,
        "coverage": foreground / size,
        "ignored": ignored / size,
        "confidence": None if stage in WITHOUT_CONFIDENCE else confidence / store.CONFIDENCE_STEPS / size,
        "tagged_classes_without_pixels": empty / tagged if tagged else None,
    }
    if tally.truth[stage].images:
        figures |= truth.figures(tally.truth[stage], names, inputs.settings.ignored_prediction)
    return figures


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), DIGITS) if math.isfinite(value) else None
    return value
