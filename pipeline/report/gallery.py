"""Gallery stores of all columns → blocks of pictures that the page loads when it shows them, and a table of small facts.

A block holds the pictures of some images for all methods. What the page needs before any picture is loaded (ids, tags, figures) is
one small row per image, so that memory grows with the rows and not with the pictures.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import stage_order
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.report import rows as audit_rows

PER_BLOCK = 48
DIGITS = 4


class Gallery:
    """The stores of some columns. `ids` are all their images, those first that the first column knows least well."""

    def __init__(self, folder: Path, methods: Sequence[str], records: Records) -> None:
        self.stores = {method: store.Store(folder / f"{method}.h5", store.GALLERY) for method in methods}
        self.records = records.by_id()
        unknown = sorted({i for one in self.stores.values() for i in one.ids} - set(self.records))
        if unknown:
            raise ValueError(f"{folder} shows images that the records lack: {', '.join(unknown[:5])}; run `dvc repro`")
        self.miou, self.kinds, self.present, self.sizes = (
            {method: one.column(name) for method, one in self.stores.items()} for name in ("miou", "kind", "present", "size")
        )
        self.ids = sorted({i for one in self.stores.values() for i in one.ids}, key=self._rank)

    def _rank(self, image_id: str) -> tuple[int, float, str]:
        for at, miou in enumerate(self.miou.values()):
            if image_id in miou:
                known = [float(value) for value in miou[image_id] if not math.isnan(value)]
                return (at, known[-1] if known else 2.0, image_id)
        raise KeyError(image_id)

    def stage_of(self, image_id: str) -> dict[str, str]:
        """Name of a mask in the gallery → stage of the pipeline, for the split of this image."""
        return {stage_order.without_split(stage): stage for stage in stage_order.OF_SPLIT[self.records[image_id].split]}

    def table(self, found: Mapping[str, Mapping[tuple[str, str], audit_rows.Row]]) -> dict[str, Any]:
        """Small facts as columns that run over `ids`; `found` is method → (id, stage) → its row of audit/<run>.csv."""
        some = {i: next(method for method, one in self.stores.items() if i in one) for i in self.ids}
        return {
            "ids": self.ids,
            "splits": [self.records[i].split for i in self.ids],
            "tags": [None if self.records[i].tags is None else list(self.records[i].tags or ()) for i in self.ids],
            "sizes": [self.sizes[some[i]][i].tolist() for i in self.ids],
            "truth": [int(self.stores[some[i]].shape_of(i, "truth") != (0,)) for i in self.ids],
            "per_block": PER_BLOCK,
            "methods": {method: self._of_method(method, found.get(method, {})) for method in self.stores},
        }

    def _of_method(self, method: str, found: Mapping[tuple[str, str], audit_rows.Row]) -> dict[str, Any]:
        kinds = [int(self.kinds[method][i][0]) if i in self.kinds[method] else -1 for i in self.ids]
        figures: dict[str, dict[str, list[Any]]] = {}
        for at, image_id in enumerate(self.ids):
            if image_id not in self.kinds[method]:
                continue
            names, present = self.stage_of(image_id), self.present[method][image_id]
            for position, name in enumerate(stage_order.GALLERY):
                if not present[position] or name not in names:
                    continue
                kept = figures.setdefault(names[name], {})
                row = found.get((image_id, names[name]))
                miou = float(self.miou[method][image_id][position])
                self._put(kept, "miou", at, None if math.isnan(miou) else round(miou, DIGITS))
                if row is None:
                    continue
                for what in ("score", "method_agreement", "both"):
                    value = getattr(row, what)
                    self._put(kept, what, at, None if value is None else round(value, DIGITS))
                self._put(kept, "reasons", at, list(row.reasons) or None)
        return {"kinds": kinds, "stages": figures}

    def _put(self, kept: dict[str, list[Any]], name: str, at: int, value: Any) -> None:
        if value is not None:
            kept.setdefault(name, [None] * len(self.ids))[at] = value

    def write(self, folder: Path) -> list[Path]:
        """data-0000.js …: a call of tag2mask.block each; one block is in memory at a time."""
        paths = []
        for block, at in enumerate(range(0, len(self.ids), PER_BLOCK)):
            path = folder / f"data-{block:04d}.js"
            items = [self._pictures(image_id) for image_id in self.ids[at : at + PER_BLOCK]]
            path.write_text(f"tag2mask.block({block},{as_script(items)});\n", encoding="utf-8")
            paths.append(path)
        return paths

    def _pictures(self, image_id: str) -> dict[str, Any]:
        found: dict[str, Any] = {"methods": {}}
        for method, one in self.stores.items():
            if image_id not in one:
                continue
            if "photograph" not in found:
                found |= {name: _text(one.read(image_id, name)) for name in ("photograph", "truth")}
            present = [
                name for name, there in zip(stage_order.GALLERY, self.present[method][image_id], strict=True) if there
            ]
            maps = {name: _text(one.read(image_id, name)) for name in ("scores", "maps")}
            found["methods"][method] = {**maps, "present": present}
        return found


def _text(data: np.ndarray) -> str:
    return base64.b64encode(data.tobytes()).decode("ascii")


def as_script(value: Any) -> str:
    """JSON that is safe inside a script element and as JavaScript: no <, >, & and no line separators of Unicode."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
