"""Stage evaluate: all results of a run + truth → figures, plots, a row per image and stage, pictures for the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.audit import empty_masks, gallery, score, tables, tally
from pipeline.audit.summary import headline, summary
from pipeline.audit.tally import Inputs, RunAudit, Tally
from pipeline.core import records as records_file
from pipeline.core import refiner_state, store
from pipeline.core.records import Records
from pipeline.core.sections import Evaluate, Settings
from pipeline.jobs.engine import Engine


@dataclass(frozen=True)
class Outs:
    """Files that the stage writes.

    metrics      a dozen figures for `dvc metrics` and `dvc exp show`, JSON
    figures      all figures, JSON
    images       quality indicators, score and reasons per image and stage, CSV
    small_masks  thumbnail of every image's mask at the last stage, HDF5
    gallery      thumbnails of the worst and of random images, HDF5
    thresholds, per_class, confusion   CSV for dvc plots
    """

    metrics: Path
    figures: Path
    images: Path
    small_masks: Path
    gallery: Path
    thresholds: Path
    per_class: Path
    confusion: Path


def run(
    settings: Settings, *, records: Path, truth: Path, scoremaps: Path, refiner: Path, refined: Path, pseudo_masks: Path,
    predictions: Path, held_out: Path, relabelled: Path, outs: Outs, engine: Engine,
) -> None:  # fmt: skip
    """Scores every stage of a run on the images that have truth; without any, writes the figures that need none."""
    listed, rules = records_file.read(records), settings.shared(Evaluate, "evaluate")
    inputs = Inputs(
        truth=truth, scoremaps=scoremaps, refined=refined, pseudo_masks=pseudo_masks, predictions=predictions,
        held_out=held_out, relabelled=relabelled, threshold=tally.fitted_threshold(refiner), settings=rules,
        labels=listed.labels, root=settings.root, loaders=engine.loaders("cpu"),
    )  # fmt: skip
    batches = [listed.images[at : at + tally.BATCH] for at in range(0, len(listed), tally.BATCH)]
    total = Tally.empty(len(listed.labels) + 1, rules.threshold_bins)
    count = partial(tally.tally_batch, inputs=inputs)
    tallies = engine.map_parts(count, batches, what=f"evaluate {settings.name}", images=len)
    _write(outs.small_masks, store.SMALL_MASKS, tally.add_batches(tallies, total), listed, "gzip")
    audit = tally.audit_of(total)
    figures = summary(audit, inputs, listed, store.file_digest(records))
    figures |= {"supervision": refiner_state.supervision(refiner)}
    write_tables(audit, figures, listed, outs)
    images = gallery.gallery_images(audit, listed, rules.gallery)
    groups = [images[at : at + gallery.BATCH] for at in range(0, len(images), gallery.BATCH)]
    items = engine.map_parts(partial(gallery.items, inputs=inputs), groups, what=f"pictures {settings.name}", images=len)
    _write(outs.gallery, store.GALLERY, chain.from_iterable(items), listed, "none")
    for path, values in ((outs.figures, figures), (outs.metrics, headline(figures))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    if "empty_masks" in figures:
        engine.warn("%s", empty_masks.warning(settings.name, figures["empty_masks"]))


def _write(path: Path, schema: store.Schema, items: Any, records: Records, compression: str) -> None:
    store.write_part(path, schema, items, labels=records.labels, part=0, parts=1, params_digest="", compression=compression)


def write_tables(audit: RunAudit, figures: dict[str, Any], records: Records, outs: Outs) -> None:
    """The CSV files: three for `dvc plots`, and audit/<run>.csv with a line per image and stage. figures: from `summary`."""
    tables.write_thresholds(audit.curve, outs.thresholds)
    tables.write_per_class(figures, outs.per_class)
    names = ["background", *records.labels.names]
    tables.write_confusion(audit.tally.truth["pseudo_masks"].confusion, names, outs.confusion)
    score.write(outs.images, audit.rows, records.by_id(), records.labels, audit.limits, audit.scores)
