"""Figures, curves, galleries and inner maps of the runs → report/: one page that needs no network, and review.csv.

The page is index.html; pictures and the rows of the table of images are inside it, or in data-*.js and rows/*.js beside it
where they are too large together.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.core import records as records_file
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.core.sections import Report
from pipeline.report import audits, available, charts, colours, inner_maps, run_metrics, surroundings, templates
from pipeline.report import gallery as blocks
from pipeline.report import rows as audit_rows
from pipeline.report.available import Inputs
from pipeline.report.image_table import ImageTable
from pipeline.report.scripts import as_script
from pipeline.stage_order import LAST, OF_SPLIT

TEMPLATE = "page.html.jinja"
SCRIPTS = ("base.js", "data.js", "paint.js", "gallery.js", "viewer.js", "table.js", "images.js", "provenance.js", "app.js")
INLINE_BYTES = 15_000_000  # of the whole page; larger ones load pictures and rows from files beside it
SCRIPTS_MARK = "<!-- pictures and rows -->"
ROWS = "rows"  # folder of the pages of rows


def write(out: Path, inputs: Inputs, methods: Sequence[str], settings: Report, outdated: Collection[str] = ()) -> Path:
    """Replaces the folder `out`; returns the page's path. Runs that cannot be shown are named on the page.

    methods: names of the runs of params.yaml; outdated: of those that DVC would run again. Everything that comes from data
    (ids, class names, reasons) is escaped. FileNotFoundError where no run can be shown; ValueError where a table is damaged.
    """
    runs = available.runs(inputs, methods)
    new = out.with_name(out.name + ".new")  # never in place: files of `out` may be hard links into DVC's cache
    shutil.rmtree(new, ignore_errors=True)
    (new / ROWS).mkdir(parents=True)
    metrics = run_metrics.read(inputs.audit, runs.shown, inputs.metrics / "upper_bound")
    records = records_file.read(inputs.records, _pictured(inputs, runs.shown))
    gallery = blocks.Gallery(inputs.gallery, runs.shown, records)
    tables = {(method, split): ImageTable(records.labels.names) for method in runs.shown for split in LAST}
    audit = audits.read(inputs.audit, runs.shown, gallery.ids, settings.review, tables)
    audit_rows.write_review(new / "review.csv", audit.worst)
    script_data = {
        "methods": runs.shown,
        "stages": run_metrics.shown_stages(metrics),
        "splits": run_metrics.splits_of(metrics),
        "classes": ["background", *records.labels.names],
        "colours": colours.of_classes(len(records.labels), settings.palette),
        "images": gallery.table(audit.gallery_rows),
        "tables": {
            split: [tables[method, split].write(new / ROWS, f"{at}-{split}") for at, method in enumerate(runs.shown)]
            for split in LAST
        },
        "last_stages": LAST,
        "previous_stages": run_metrics.previous_stages(metrics),
    }
    notices = {"absent": runs.absent, "outdated": [method for method in runs.shown if method in outdated]}
    text = render(settings.title, records, metrics, inputs, script_data, audit, notices)
    _write_page(new / "index.html", text, [*gallery.write(new), *sorted((new / ROWS).iterdir())])
    if out.exists():
        shutil.rmtree(out)
    new.replace(out)
    return out / "index.html"


def _pictured(inputs: Inputs, methods: Sequence[str]) -> set[str]:
    """Ids of all images that the page has a picture of."""
    folders = ((inputs.gallery, store.GALLERY), (inputs.inspection, store.INSPECTION))
    return {i for folder, schema in folders for method in methods for i in store.Store(folder / f"{method}.h5", schema).ids}


def _write_page(path: Path, text: str, beside: Sequence[Path]) -> None:
    """The page; where all of it is at most INLINE_BYTES, with the scripts that lie beside it inside, which are then removed.

    beside: blocks of pictures and pages of rows, each a call with a name or a number, and JSON.
    """
    size = len(text.encode("utf-8")) + sum(script.stat().st_size for script in beside)
    with path.open("w", encoding="utf-8") as file:
        start, end = text.split(SCRIPTS_MARK)
        file.write(start)
        if size <= INLINE_BYTES:
            for script in beside:
                file.write(f'<script type="application/json" id="{script.stem}">{_argument(script)}</script>\n')
                script.unlink()
            (path.parent / ROWS).rmdir()
        file.write(end)


def _argument(path: Path) -> str:
    """The JSON inside `tag2mask.block(0,…);` or `tag2mask.rows("0-id-0000",…);`."""
    return path.read_text(encoding="utf-8").partition(",")[2].rstrip("\n").removesuffix(");")


def render(
    title: str,
    records: Records,
    metrics: Mapping[str, Mapping[str, Any]],
    inputs: Inputs,
    script_data: Mapping[str, Any],
    audit: audits.Audits,
    notices: Mapping[str, Any],
) -> str:
    """The page as text, with SCRIPTS_MARK where blocks of pictures and pages of rows go."""
    script = Markup("(() => {\n" + "".join(templates.text(name) for name in SCRIPTS) + "})();")
    images = script_data["images"]
    inspection = {method: inputs.inspection / f"{method}.h5" for method in metrics}
    return templates.environment().get_template(TEMPLATE).render(
        title=title,
        records=records,
        metrics=metrics,
        first_run=next(iter(metrics.values())),
        script_data=Markup(as_script(script_data)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        style=templates.style(),
        scripts_mark=Markup(SCRIPTS_MARK),
        notices=notices,
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
        stages_of_train=OF_SPLIT["train"],
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
