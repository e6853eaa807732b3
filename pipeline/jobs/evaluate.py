"""Stage evaluate: all results of one run + truth → metrics, plots, a row per image and stage, small pictures for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.audit import gallery, score, tables, tally
from pipeline.audit.summary import summary
from pipeline.audit.tally import Audited, Inputs, Tally
from pipeline.core import records as records_file
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.core.sections import Evaluate, Settings
from pipeline.jobs.engine import Engine


@dataclass(frozen=True)
class Outs:
    """Files that the stage writes.

    metrics      figures per stage, JSON
    images       quality indicators, score and reasons per image and stage, CSV
    small_masks  every image's last mask in small, HDF5
    gallery      small pictures of the worst and of random images, HDF5
    thresholds, per_class, confusion   CSV for dvc plots
    """

    metrics: Path
    images: Path
    small_masks: Path
    gallery: Path
    thresholds: Path
    per_class: Path
    confusion: Path


def run(
    settings: Settings, *, records: Path, truth: Path, scoremaps: Path, refiner: Path, refined: Path, pseudo_masks: Path,
    predictions: Path, held_out: Path, outs: Outs, engine: Engine,
) -> None:  # fmt: skip
    """Scores every stage of a run on the images that have truth; without any, gives the figures that need none."""
    listed, rules = records_file.read(records), settings.shared(Evaluate, "evaluate")
    inputs = Inputs(
        truth=truth, scoremaps=scoremaps, refined=refined, pseudo_masks=pseudo_masks, predictions=predictions,
        held_out=held_out, level=tally.chosen_level(refiner), settings=rules, labels=listed.labels, root=settings.root,
    )  # fmt: skip
    chunks = [listed.images[at : at + tally.PER_ITEM] for at in range(0, len(listed), tally.PER_ITEM)]
    total = Tally.empty(len(listed.labels) + 1, rules.threshold_bins)
    counted = engine.each(partial(tally.tally_some, inputs=inputs), chunks, what=f"evaluate {settings.name}")
    _write(outs.small_masks, store.SMALL_MASKS, tally.gathered(counted, total), listed, "gzip")
    audit = tally.audited(total)
    figures = summary(audit, inputs, listed)
    write_tables(audit, figures, listed, outs)
    chosen = gallery.shown(audit, listed, rules.gallery)
    groups = [chosen[at : at + gallery.PER_ITEM] for at in range(0, len(chosen), gallery.PER_ITEM)]
    drawn = engine.each(partial(gallery.draw_some, inputs=inputs), groups, what=f"pictures {settings.name}")
    _write(outs.gallery, store.GALLERY, chain.from_iterable(drawn), listed, "none")
    outs.metrics.parent.mkdir(parents=True, exist_ok=True)
    outs.metrics.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _write(path: Path, schema: store.Schema, items: Any, records: Records, compression: str) -> None:
    store.write_part(path, schema, items, labels=records.labels, part=0, parts=1, params_digest="", compression=compression)


def write_tables(audit: Audited, figures: dict[str, Any], records: Records, outs: Outs) -> None:
    """The CSV files: three for `dvc plots`, and audit/<run>.csv with one line per image and stage. figures: of `summary`."""
    tables.write_thresholds(audit.curve, outs.thresholds)
    tables.write_per_class(figures, outs.per_class)
    names = ["background", *records.labels.names]
    tables.write_confusion(audit.tally.truth["pseudo_masks"].confusion, names, outs.confusion)
    score.write(outs.images, audit.rows, records.by_id(), records.labels, audit.limits, audit.scores)
