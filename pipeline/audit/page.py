"""Metrics and picture strips of all columns → one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.core import store
from pipeline.core.records import Records

TEMPLATE = "page.html.jinja"
STAGES = ("score_maps", "refined", "pseudo_masks", "score_maps_val", "predictions")
KINDS = ("worst", "random")


def read_metrics(folder: Path, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """metrics/<m>.json of the columns of params.yaml; files of columns that are gone are left out."""
    missing = [method for method in methods if not (folder / f"{method}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no metrics of {', '.join(missing)}; run `dvc repro`")
    return {method: json.loads((folder / f"{method}.json").read_text(encoding="utf-8")) for method in methods}


def render(
    title: str, records: Records, found: Mapping[str, Mapping[str, Any]], strips_folder: Path, strip_height: int
) -> str:
    """The page as text. Everything that comes from data (ids, class names, reasons) is escaped by the template."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": figure, "percent": percent}
    by_id = records.by_id()
    pictures = {}
    for method in found:
        groups: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for image_id, strip in store.Store(strips_folder / f"{method}.h5", store.STRIPS):
            tags = by_id[image_id].tags
            groups[KINDS[int(strip["kind"][0])]].append(
                {
                    "id": image_id,
                    "tags": "untagged"
                    if tags is None
                    else ", ".join(records.labels.names[tag] for tag in tags) or "no class",
                    "miou": float(strip["miou"][0]),
                    "source": "data:image/jpeg;base64," + base64.b64encode(strip["jpeg"].tobytes()).decode("ascii"),
                }
            )
        groups["worst"].sort(key=lambda one: (math.isnan(one["miou"]), one["miou"], one["id"]))
        pictures[method] = groups
    return environment.get_template(TEMPLATE).render(
        title=title,
        records=records,
        found=found,
        first=next(iter(found.values())),
        pictures=pictures,
        stages=STAGES,
        kinds=KINDS,
        height=strip_height,
    )


def figure(value: float | None) -> str:
    """0.5231 → 0.523; a dash where there is no figure."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f} %"
