"""Metrics, curves, galleries and inner maps of all runs → report/: one page that needs no network, and review.csv.

The page is index.html; its pictures are inside it, or in data-*.js beside it where they are too large together.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.core.records import Records
from pipeline.core.sections import Report
from pipeline.report import (
    audits,
    charts,
    colours,
    inner_maps,
    method_agreement,
    run_metrics,
    surroundings,
    templates,
)
from pipeline.report import gallery as blocks
from pipeline.report import rows as audit_rows
from pipeline.stage_order import LAST

TEMPLATE = "page.html.jinja"
SCRIPTS = ("base.js", "data.js", "paint.js", "gallery.js", "viewer.js", "app.js")
INLINE_BYTES = 15_000_000  # of the whole page; larger ones load their pictures from files beside it
PICTURES_MARK = "<!-- pictures -->"


@dataclass(frozen=True)
class Inputs:
    """Folders that the page is made from.

    metrics     <run>.json, and upper_bound/<run>.json
    plots       <run>/threshold.csv
    gallery     <run>.h5 of GALLERY
    inspection  <run>.h5 of INSPECTION
    audit       <run>.csv, and <run>.h5 of SMALL_MASKS
    """

    metrics: Path
    plots: Path
    gallery: Path
    inspection: Path
    audit: Path


def write(out: Path, records: Records, methods: Sequence[str], inputs: Inputs, settings: Report) -> None:
    """Writes the folder `out`; methods: names of the runs. Everything that comes from data (ids, class names, reasons) is
    escaped. FileNotFoundError or ValueError where an input is missing or of another version."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("data-*.js"):
        old.unlink()
    metrics = run_metrics.read(inputs.metrics, methods)
    gallery = blocks.Gallery(inputs.gallery, methods, records)
    agreement = method_agreement.read(inputs.audit, methods, records)
    audit = audits.read(inputs.audit, methods, gallery.ids, settings.review, agreement)
    audit_rows.write_review(out / "review.csv", audit.worst)
    script_data = {
        "methods": list(methods),
        "stages": run_metrics.shown_stages(metrics),
        "splits": run_metrics.splits_of(metrics),
        "classes": ["background", *records.labels.names],
        "colours": colours.of_classes(len(records.labels), settings.palette),
        "images": gallery.table(audit.gallery_rows),
        "last_stages": LAST,
        "previous_stages": run_metrics.previous_stages(metrics),
    }
    text = render(settings.title, records, metrics, inputs, script_data, audit)
    _write_page(out / "index.html", text, gallery.write(out))


def _write_page(path: Path, text: str, blocks_of_pictures: Sequence[Path]) -> None:
    """The page, with the blocks inside it, whose files are then removed, where all of it is at most INLINE_BYTES."""
    size = len(text.encode("utf-8")) + sum(block.stat().st_size for block in blocks_of_pictures)
    with path.open("w", encoding="utf-8") as file:
        start, end = text.split(PICTURES_MARK)
        file.write(start)
        if size <= INLINE_BYTES:
            for at, block in enumerate(blocks_of_pictures):
                file.write(f'<script type="application/json" id="block-{at}">{_argument(block)}</script>\n')
                block.unlink()
        file.write(end)


def _argument(path: Path) -> str:
    """The JSON inside `tag2mask.block(0,…);`."""
    return path.read_text(encoding="utf-8").partition(",")[2].rstrip("\n").removesuffix(");")


def render(
    title: str,
    records: Records,
    metrics: Mapping[str, Mapping[str, Any]],
    inputs: Inputs,
    script_data: Mapping[str, Any],
    audit: audits.Audits,
) -> str:
    """The page as text, with PICTURES_MARK where the blocks of pictures go."""
    script = Markup("(() => {\n" + "".join(templates.text(name) for name in SCRIPTS) + "})();")
    images = script_data["images"]
    inspection = {method: inputs.inspection / f"{method}.h5" for method in metrics}
    return templates.environment().get_template(TEMPLATE).render(
        title=title,
        records=records,
        metrics=metrics,
        first_run=next(iter(metrics.values())),
        script_data=Markup(blocks.as_script(script_data)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        style=templates.style(),
        pictures_mark=Markup(PICTURES_MARK),
        charts=charts,
        threshold_curves=run_metrics.threshold_curves(inputs.plots, list(metrics)),
        flow_chains={method: run_metrics.flow_chains(figures) for method, figures in metrics.items()},
        pixel_accuracy={method: run_metrics.pixel_accuracy(figures) for method, figures in metrics.items()},
        inner_maps={method: inner_maps.read(path, records) for method, path in inspection.items()},
        surroundings={method: surroundings.read(path, records) for method, path in inspection.items()},
        colours=script_data["colours"],
        images=images,
        reasons=sorted(_reasons(images)),
        image_figures={name for columns in _stage_columns(images) for name in columns},
        pair_agreement=audit.pair_agreement,
        last_stages=LAST,
        outside_limits=audit.outside_limits,
        previous_stages=script_data["previous_stages"],
        stages=script_data["stages"],
        splits=script_data["splits"],
        miou_drops={method: run_metrics.miou_drops(figures) for method, figures in metrics.items()},
    )  # fmt: skip


def _stage_columns(images: Mapping[str, Any]) -> list[Mapping[str, Sequence[Any]]]:
    """Of the gallery's table, per method and stage: name of a figure → its values over the images."""
    return [columns for method in images["methods"].values() for columns in method["stages"].values()]


def _reasons(images: Mapping[str, Any]) -> set[str]:
    lists = (reasons for columns in _stage_columns(images) for reasons in columns.get("reasons", ()))
    return {reason for reasons in lists for reason in reasons or ()}
