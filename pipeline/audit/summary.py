"""Counts of all images → metrics/<run>.json as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.audit import score, truth
from pipeline.audit.tally import Audited, Inputs, Tally
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.stage_order import LAST, SPLIT_OF, STAGES

DIGITS = 5
WITHOUT_CONFIDENCE = ("decoder", "decoder_val")


def summary(audit: Audited, inputs: Inputs, records: Records) -> dict[str, Any]:
    """metrics/<m>.json as plain values, rounded: no time, host or path."""
    tally, names = audit.tally, ["background", *inputs.labels.names]
    scored = any(tally.truth[stage].images for stage in LAST.values())
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
    if (mended := inputs.pseudo_masks / store.CORRECTED).is_file():
        found["corrected"] = json.loads(mended.read_text(encoding="utf-8"))["corrected"]
    if not scored:
        found["note"] = "There is no ground truth: only figures that need none are given."
    for split, stage in LAST.items():
        if tally.truth[stage].images:
            found.setdefault("everything_background", {})[split] = _everything_background(tally.truth[stage].confusion)
    if len(audit.curve):
        best = int(np.argmax(audit.curve))
        chosen, oracle = metrics.miou(tally.truth["score_maps"].confusion, protocol="background"), audit.curve[best]
        found["threshold"] |= {
            "oracle": best / len(audit.curve), "miou_at_chosen": chosen, "miou_at_oracle": oracle, "regret": max(0.0, oracle - chosen),
        }  # fmt: skip
    return _rounded(found | _of_rows(audit, records, names))


def _of_rows(audit: Audited, records: Records, names: Sequence[str]) -> dict[str, Any]:
    """What the rows and the step from one stage to the next say."""
    final = [row for row in audit.rows if row.stage == LAST["train"]]
    found: dict[str, Any] = {
        "flow": [{"from": a, "to": b, **flow.as_values(names)} for (a, b), flow in audit.tally.flow.items() if flow.images],
        "signs": {stage: audit.limits.medians[stage] for stage in STAGES if stage in audit.limits.medians},
        "limits": audit.limits.as_values(),
        "co_occurrence": score.co_occurrence(final, records.by_id(), names),
    }
    told = score.agreement_with_truth(audit.rows, audit.scores)
    return found | ({"score": told} if told else {})


def _everything_background(counts: np.ndarray) -> float:
    """mIoU of a prediction without any foreground: what a figure must beat to mean anything."""
    nothing = np.zeros_like(counts)
    nothing[:, 0] = counts.sum(axis=1)
    return metrics.miou(nothing, protocol="background")


def _stage(tally: Tally, stage: str, names: Sequence[str], inputs: Inputs) -> dict[str, Any]:
    size, foreground, ignored, confidence = (int(value) for value in tally.pixels[stage])
    tagged, empty = (int(value) for value in tally.tags[stage])
    found: dict[str, Any] = {
        "split": SPLIT_OF[stage],
        "images": tally.images[stage],
        "images_with_truth": tally.truth[stage].images,
        "coverage": foreground / size,
        "ignored": ignored / size,
        "confidence": None if stage in WITHOUT_CONFIDENCE else confidence / store.CONFIDENCE_STEPS / size,
        "tagged_classes_without_pixels": empty / tagged if tagged else None,
    }
    if tally.truth[stage].images:
        found |= truth.figures(tally.truth[stage], names, inputs.settings.ignored_prediction)
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), DIGITS) if math.isfinite(value) else None
    return value
