"""Metrics and picture strips of all columns → one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.audit import surroundings
from pipeline.core import store
from pipeline.core.records import Records

TEMPLATE = "page.html.jinja"
STAGES = ("score_maps", "decoder", "refined", "pseudo_masks", "score_maps_val", "decoder_val", "predictions")
KINDS = ("worst", "random")
CHAINS = (
    ("score_maps", "decoder"),
    ("score_maps", "refined", "pseudo_masks"),
    ("score_maps_val", "decoder_val", "predictions"),
)


def read_metrics(folder: Path, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """metrics/<m>.json of the columns of params.yaml; files of columns that are gone are left out."""
    missing = [method for method in methods if not (folder / f"{method}.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} has no metrics of {', '.join(missing)}; run `dvc repro`")
    return {method: json.loads((folder / f"{method}.json").read_text(encoding="utf-8")) for method in methods}


def render(
    title: str,
    records: Records,
    found: Mapping[str, Mapping[str, Any]],
    strips_folder: Path,
    inspection_folder: Path,
    strip_height: int,
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
                    "source": _inline(strip["jpeg"]),
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
        inner={method: inspected(inspection_folder / f"{method}.h5", records) for method in found},
        beside={method: surroundings.read(inspection_folder / f"{method}.h5", records) for method in found},
        stages=shown_stages(found),
        splits=splits_of(found),
        setbacks={method: setbacks(facts) for method, facts in found.items()},
        kinds=KINDS,
        height=strip_height,
    )


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
