"""Gallery stores of all runs → blocks of pictures that the page loads when it shows them, and a table of figures.

A block holds the pictures of PER_BLOCK images for all methods. What the page needs before any picture is loaded (ids, tags,
figures) is a small row per image, so that memory grows with the rows and not with the pictures.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import stage_order
from pipeline.core import store
from pipeline.core.records import Records
from pipeline.report import rows as audit_rows
from pipeline.report.scripts import as_script

PER_BLOCK = 48
DIGITS = 4


class Gallery:
    """Stores of the runs `methods` in `folder`. records: of all their images.

    ids: all their images; first those of the first run, ascending by the mIoU of their last stage, without mIoU at the end;
    then those that only later runs have.
    """

    def __init__(self, folder: Path, methods: Sequence[str], records: Records) -> None:
        self.stores = {method: store.Store(folder / f"{method}.h5", store.GALLERY) for method in methods}
        self.records = records.by_id()
        ids = {image_id for gallery in self.stores.values() for image_id in gallery.ids}
        self.miou, self.kinds, self.present, self.sizes = (
            {method: gallery.column(name) for method, gallery in self.stores.items()}
            for name in ("miou", "kind", "present", "size")
        )
        self.ids = sorted(ids, key=self._rank)

    def _rank(self, image_id: str) -> tuple[int, float, str]:
        for at, miou in enumerate(self.miou.values()):
            if image_id in miou:
                known = [float(value) for value in miou[image_id] if not math.isnan(value)]
                return (at, known[-1] if known else 2.0, image_id)
        raise KeyError(image_id)

    def stage_of(self, image_id: str) -> dict[str, str]:
        """Name of a mask in the gallery → stage of the pipeline, for the split of this image."""
        return {stage_order.without_split(stage): stage for stage in stage_order.OF_SPLIT[self.records[image_id].split]}

    def table(self, rows: Mapping[str, Mapping[tuple[str, str], audit_rows.Row]]) -> dict[str, Any]:
        """What the page's script knows of the images before any picture is loaded: lists of values over `ids`.

        rows: method → (id, stage) → row of audit/<run>.csv.
        """
        first_store = {i: next(gallery for gallery in self.stores.values() if i in gallery) for i in self.ids}
        first_sizes = {i: next(sizes[i] for sizes in self.sizes.values() if i in sizes) for i in self.ids}
        return {
            "ids": self.ids,
            "splits": [self.records[i].split for i in self.ids],
            "tags": [None if self.records[i].tags is None else list(self.records[i].tags or ()) for i in self.ids],
            "sizes": [first_sizes[i].tolist() for i in self.ids],
            "truth": [int(first_store[i].shape_of(i, "truth") != (0,)) for i in self.ids],
            "per_block": PER_BLOCK,
            "methods": {method: self._of_method(method, rows.get(method, {})) for method in self.stores},
        }

    def _of_method(self, method: str, rows: Mapping[tuple[str, str], audit_rows.Row]) -> dict[str, Any]:
        """kinds: bits WORST and RANDOM of audit/gallery.py, -1 for images that the run lacks; stages: figures by stage."""
        kinds = [int(self.kinds[method][i][0]) if i in self.kinds[method] else -1 for i in self.ids]
        figures: dict[str, dict[str, list[Any]]] = {}
        for at, image_id in enumerate(self.ids):
            if image_id not in self.kinds[method]:
                continue
            names, present = self.stage_of(image_id), self.present[method][image_id]
            for position, name in enumerate(stage_order.GALLERY):
                if not present[position] or name not in names:
                    continue
                of_stage = figures.setdefault(names[name], {})
                row = rows.get((image_id, names[name]))
                miou = float(self.miou[method][image_id][position])
                self._put(of_stage, "miou", at, None if math.isnan(miou) else round(miou, DIGITS))
                if row is None:
                    continue
                for column in ("score", "method_agreement", "score_and_agreement"):
                    value = getattr(row, column)
                    self._put(of_stage, column, at, None if value is None else round(value, DIGITS))
                self._put(of_stage, "reasons", at, list(row.reasons) or None)
        return {"kinds": kinds, "stages": figures}

    def _put(self, columns: dict[str, list[Any]], name: str, at: int, value: Any) -> None:
        if value is not None:
            columns.setdefault(name, [None] * len(self.ids))[at] = value

    def write(self, folder: Path) -> list[Path]:
        """data-0000.js …: in each a call of tag2mask.block; one block is in memory at a time."""
        paths = []
        for block, at in enumerate(range(0, len(self.ids), PER_BLOCK)):
            path = folder / f"data-{block:04d}.js"
            items = [self._pictures(image_id) for image_id in self.ids[at : at + PER_BLOCK]]
            path.write_text(f"tag2mask.block({block},{as_script(items)});\n", encoding="utf-8")
            paths.append(path)
        return paths

    def _pictures(self, image_id: str) -> dict[str, Any]:
        """Pictures of an image as base64: photograph and truth, and by method its score map, and its masks in one text."""
        pictures: dict[str, Any] = {"methods": {}}
        for method, gallery in self.stores.items():
            if image_id not in gallery:
                continue
            if "photograph" not in pictures:
                pictures |= {name: _base64(gallery.read(image_id, name)) for name in ("photograph", "truth")}
            flags = self.present[method][image_id]
            present = [stage for stage, flag in zip(stage_order.GALLERY, flags, strict=True) if flag]
            maps = {name: _base64(gallery.read(image_id, name)) for name in ("scores", "confidence", "maps")}
            pictures["methods"][method] = {**maps, "present": present}
        return pictures


def _base64(data: np.ndarray) -> str:
    return base64.b64encode(data.tobytes()).decode("ascii")
