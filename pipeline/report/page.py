"""Metrics, curves, galleries and inner maps of all columns → report/: one page that needs no network, and review.csv.

The page is index.html; its pictures are inside it, or in data-*.js beside it where they are too large together.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import metrics_file
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.core.sections import Report
from pipeline.report import charts, colours, surroundings
from pipeline.report import gallery as blocks
from pipeline.report import method_agreement as between
from pipeline.report import rows as audit_rows
from pipeline.stage_order import CHAINS, LAST, STAGES

WEB = Path(__file__).parent / "web"
TEMPLATE = "page.html.jinja"
SCRIPTS = ("base.js", "data.js", "paint.js", "gallery.js", "viewer.js", "app.js")
INLINE_BYTES = 15_000_000  # of the whole page; larger ones load their pictures from files beside it


@dataclass(frozen=True)
class Inputs:
    """Folders that the page is made from: <m>.json, <m>/threshold.csv, <m>.h5, <m>.h5, <m>.csv with <m>.h5."""

    metrics: Path
    plots: Path
    gallery: Path
    inspection: Path
    audit: Path


def read_metrics(folder: Path, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """metrics/<run>.json of the runs of params.yaml; files of runs that are gone are left out.

    With the figures of metrics/upper_bound/<run>.json under `upper_bound`. FileNotFoundError for runs that have no metrics,
    ValueError for a file of another version.
    """
    missing = [method for method in methods if not (folder / f"{method}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no metrics of {', '.join(missing)}; run `dvc repro`")
    found = {method: metrics_file.read(folder / f"{method}.json") for method in methods}
    for method in methods:
        upper_bound = folder / "upper_bound" / f"{method}.json"  # benchmarks/upper_bound.py was run by hand, or was not
        if upper_bound.is_file():
            found[method]["upper_bound"] = json.loads(upper_bound.read_text(encoding="utf-8"))
    return found


def write(out: Path, records: Records, methods: Sequence[str], inputs: Inputs, settings: Report) -> None:
    """Writes the folder `out`. Everything that comes from data (ids, class names, reasons) is escaped."""
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("data-*.js"):
        old.unlink()
    found = read_metrics(inputs.metrics, methods)
    gallery = blocks.Gallery(inputs.gallery, methods, records)
    agreement = between.read(inputs.audit, methods, records)
    audit = _audit(gallery, inputs.audit, methods, settings.review, agreement)
    audit_rows.write_review(out / "review.csv", audit.worst)
    facts = {
        "methods": list(methods),
        "stages": shown_stages(found),
        "splits": splits_of(found),
        "classes": ["background", *records.labels.names],
        "colours": colours.of_classes(len(records.labels), settings.palette),
        "images": gallery.table(audit.shown),
        "last": LAST,
        "steps": {after: before for chain in CHAINS for before, after in pairwise(chain)} | _skipped(found),
    }
    text = render(settings.title, records, found, curves(inputs.plots, methods), inputs.inspection, facts, audit)
    paths = gallery.write(out)
    with (out / "index.html").open("w", encoding="utf-8") as file:
        start, end = text.split(MARK)
        file.write(start)
        if len(text.encode("utf-8")) + sum(path.stat().st_size for path in paths) <= INLINE_BYTES:
            for at, path in enumerate(paths):
                file.write(f'<script type="application/json" id="block-{at}">{_argument(path)}</script>\n')
                path.unlink()
        file.write(end)


MARK = "<!-- pictures -->"


def _argument(path: Path) -> str:
    """The JSON inside `tag2mask.block(0,…);`."""
    return path.read_text(encoding="utf-8").partition(",")[2].rstrip("\n").removesuffix(");")


def _skipped(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Stage → the one that it comes from, where no column has the one between them."""
    there = set(shown_stages(found))
    return {chain[2]: chain[0] for chain in CHAINS if len(chain) == 3 and chain[1] not in there}


@dataclass(frozen=True)
class Audit:
    """Rows of audit/<run>.csv by run.

    pairs    split → f64[m,m] agreement of two runs' masks
    shown    rows of the gallery's images by (id, stage)
    worst    of all images
    outside  (stage, quality indicator) → images of which it is out of its limits
    """

    pairs: Mapping[str, np.ndarray]
    shown: dict[str, dict[tuple[str, str], audit_rows.Row]] = field(default_factory=dict)
    worst: dict[str, list[audit_rows.Row]] = field(default_factory=dict)
    outside: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)


def _audit(
    gallery: blocks.Gallery, folder: Path, methods: Sequence[str], count: int, agreement: between.Agreement | None
) -> Audit:
    """The files are read once each, row by row."""
    shown, audit = set(gallery.ids), Audit({} if agreement is None else agreement.pairs)
    for method in methods:
        others = {} if agreement is None else agreement.images[method]
        kept = audit.shown[method] = {}
        outside = audit.outside[method] = Counter()
        rows = _keeping(audit_rows.read(folder / f"{method}.csv"), others, shown, kept, outside)
        audit.worst[method] = audit_rows.worst(rows, count)
    return audit


def _keeping(
    rows: Iterable[audit_rows.Row],
    others: Mapping[str, tuple[float, int]],
    shown: set[str],
    kept: dict[tuple[str, str], audit_rows.Row],
    outside: Counter[tuple[str, str]],
) -> Iterator[audit_rows.Row]:
    """The rows as they come, with their agreement; those of shown images are put into `kept`, and reasons counted, on the way."""
    for row in rows:
        if row.stage in audit_rows.REVIEWED and row.id in others:
            value, compared = others[row.id]
            row = replace(row, method_agreement=value, compared=compared)
        if row.id in shown:
            kept[row.id, row.stage] = row
        outside.update({(row.stage, reason.partition(":")[0]) for reason in row.reasons})
        yield row


def curves(folder: Path, methods: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """threshold.csv of each run as (threshold, mIoU); empty without truth."""
    found = {}
    for method in methods:
        path = folder / method / "threshold.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run `dvc repro`")
        with path.open(encoding="utf-8", newline="") as file:
            found[method] = [(float(row["threshold"]), float(row["miou"])) for row in csv.DictReader(file)]
    return found


def render(
    title: str,
    records: Records,
    found: Mapping[str, Mapping[str, Any]],
    curve: Mapping[str, Sequence[tuple[float, float]]],
    inspection_folder: Path,
    facts: Mapping[str, Any],
    audit: Audit,
) -> str:
    """The page as text, with MARK where pictures go."""
    environment = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "percent": percent, "stage": stage_name}
    script = Markup("(() => {\n" + "".join((WEB / name).read_text(encoding="utf-8") for name in SCRIPTS) + "})();")
    first = next(iter(found.values()))
    return environment.get_template(TEMPLATE).render(
        title=title,
        records=records,
        found=found,
        first=first,
        facts=Markup(blocks.as_script(facts)),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        style=Markup((WEB / "page.css").read_text(encoding="utf-8")),
        mark=Markup(MARK),
        charts=charts,
        curves=curve,
        flows={method: flows(one) for method, one in found.items()},
        right={method: accuracy(one) for method, one in found.items()},
        inner={method: inspected(inspection_folder / f"{method}.h5", records) for method in found},
        beside={method: surroundings.read(inspection_folder / f"{method}.h5", records) for method in found},
        colours=facts["colours"],
        images=facts["images"],
        reasons=sorted(_reasons(facts["images"])),
        told={what for m in facts["images"]["methods"].values() for one in m["stages"].values() for what in one},
        pairs=audit.pairs,
        last=LAST,
        outside=audit.outside,
        steps=facts["steps"],
        stages=shown_stages(found),
        splits=splits_of(found),
        setbacks={method: setbacks(one) for method, one in found.items()},
    )


def _reasons(images: Mapping[str, Any]) -> set[str]:
    columns = (one.get("reasons", ()) for found in images["methods"].values() for one in found["stages"].values())
    return {word for column in columns for words in column for word in words or ()}


def shown_stages(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Stages that at least one column has, in the order of the pipeline."""
    return [stage for stage in STAGES if any(stage in facts["stages"] for facts in found.values())]


def splits_of(found: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The split that each stage's masks are of."""
    return {stage: one["split"] for facts in found.values() for stage, one in facts["stages"].items()}


def setbacks(facts: Mapping[str, Any]) -> list[tuple[str, str, float, float]]:
    """Stages whose masks are worse than those they come from: (earlier stage, later stage, its mIoU, the later one's)."""
    miou = {stage: one["miou"] for stage, one in facts["stages"].items() if one.get("miou") is not None}
    found = []
    for chain in CHAINS:
        there = [stage for stage in chain if stage in miou]
        found += [(a, b, miou[a], miou[b]) for a, b in pairwise(there) if miou[b] < miou[a]]
    return found


def flows(facts: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The steps of `flow` as chains: a step follows the one that ends where it begins. `all`: fractions of all pixels."""
    chains: list[list[Mapping[str, Any]]] = []
    for one in facts.get("flow", ()):
        step = {"all": {name: one.get(name, 0.0) for name in ("corrected", "broken")}, **one}
        follows = next((chain for chain in chains if chain[-1]["to"] == step["from"]), None)
        if follows is not None:
            follows.append(step)
        else:
            chains.append([step])
    return chains


def accuracy(facts: Mapping[str, Any]) -> dict[str, float]:
    """Share of right pixels of the stages that have truth."""
    return {s: one["pixel_accuracy"] for s, one in facts["stages"].items() if one.get("pixel_accuracy") is not None}


def inspected(path: Path, records: Records) -> dict[str, Any]:
    """What extract kept of a method's inside: pictures, names of their panels, and weights by layer and head (mean of images)."""
    by_id, pictures, panels, tables = records.by_id(), [], [], []
    for image_id, item in store.Store(path, store.INSPECTION):
        if not item["jpeg"].size:  # shown for its surroundings alone
            continue
        tags = by_id[image_id].tags or ()
        panels = item["panels"].tobytes().decode("utf-8").split(",")
        shown = records.labels.names[tags[0]] if tags else "no class"
        pictures.append({"id": image_id, "shown": shown, "source": _inline(item["jpeg"])})
        if item["weights"].size:
            tables.append(item["weights"])
    weights = np.mean(tables, axis=0, dtype=np.float64).tolist() if tables else []
    return {"pictures": pictures, "panels": panels, "weights": weights}


def _inline(jpeg: np.ndarray) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode("ascii")


def figure(value: float | None) -> str:
    """0.5231 → 0.523; a dash where there is no figure."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def stage_name(stage: str) -> str:
    return stage.replace("_", " ")
