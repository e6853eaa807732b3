"""audit/<run>.csv and <run>.h5 of all runs, image by image → rows of the gallery's images, the worst rows, the table of all
images, images outside the limits, agreement between the runs."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import store
from pipeline.report import rows as audit_rows
from pipeline.report.image_table import ImageTable
from pipeline.report.method_agreement import Agreement
from pipeline.stage_order import SPLIT_OF


@dataclass(frozen=True)
class Audits:
    """By run, but for pair_agreement.

    gallery_rows    (id, stage) → row, of the gallery's images
    worst           of all images, ascending by quality
    outside_limits  (stage, quality indicator) → number of images of which it is out of its limits
    pair_agreement  split → f64[m,m] agreement of two runs' masks; empty where there is one run
    """

    gallery_rows: dict[str, dict[tuple[str, str], audit_rows.Row]] = field(default_factory=dict)
    worst: dict[str, list[audit_rows.Row]] = field(default_factory=dict)
    outside_limits: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)
    pair_agreement: dict[str, np.ndarray] = field(default_factory=dict)


def read(
    folder: Path, methods: Sequence[str], gallery_ids: Iterable[str], count: int, tables: Mapping[str, ImageTable]
) -> Audits:
    """Reads all files once, side by side. count: of `worst`, per run; tables: run → where the rows of all images go."""
    ids, audits, agreement = set(gallery_ids), Audits(), Agreement(methods)
    worst = {method: audit_rows.Worst(count) for method in methods}
    for method in methods:
        audits.gallery_rows[method], audits.outside_limits[method] = {}, Counter()
    for image_id, rows, masks in images(folder, methods):
        split = next(SPLIT_OF[row.stage] for of_method in rows.values() for row in of_method)
        agreed = agreement.add(image_id, split, masks) if len(methods) > 1 else {}
        for method, of_method in rows.items():
            for row in of_method:
                if row.stage in audit_rows.REVIEWED and method in agreed:
                    value, compared = agreed[method]
                    row = replace(row, method_agreement=value, compared=compared)
                if image_id in ids:
                    audits.gallery_rows[method][image_id, row.stage] = row
                names = {(row.stage, reason.partition(":")[0]) for reason in row.reasons}
                audits.outside_limits[method].update(names)
                worst[method].add(row)
                if row.stage in audit_rows.REVIEWED:
                    tables[method].add(row)
    audits.worst.update({method: of_method.rows() for method, of_method in worst.items()})
    audits.pair_agreement.update(agreement.pairs())
    return audits


def images(
    folder: Path, methods: Sequence[str]
) -> Iterator[tuple[str, dict[str, list[audit_rows.Row]], dict[str, np.ndarray]]]:
    """(id, its rows by run, its mask of the last stage by run) in id order; one image is in memory at a time.

    ValueError where a table is not sorted by id, or lacks an image that has a mask.
    """
    sources: list[Iterator[tuple[str, str, Any]]] = []
    for method in methods:
        sources.append(_rows_by_image(folder / f"{method}.csv", method))
        if len(methods) > 1:
            sources.append(_masks_by_image(folder / f"{method}.h5", method))
    for image_id, entries in groupby(heapq.merge(*sources, key=itemgetter(0)), key=itemgetter(0)):
        rows, masks = {}, {}
        for _, method, value in entries:
            (rows if isinstance(value, list) else masks)[method] = value
        if lacking := sorted(set(masks) - set(rows)):
            run = lacking[0]
            raise ValueError(f"{folder / run}.h5 has a mask of {image_id!r}, which {run}.csv lacks; run `dvc repro`")
        yield image_id, rows, masks


def _rows_by_image(path: Path, method: str) -> Iterator[tuple[str, str, list[audit_rows.Row]]]:
    previous = None
    for image_id, rows in groupby(audit_rows.read(path), key=lambda row: row.id):
        if previous is not None and image_id <= previous:
            raise ValueError(f"{path}: {image_id!r} comes after {previous!r}, but rows are sorted by id; run `dvc repro`")
        previous = image_id
        yield image_id, method, list(rows)


def _masks_by_image(path: Path, method: str) -> Iterator[tuple[str, str, np.ndarray]]:
    for image_id, fields in store.stream(path, store.SMALL_MASKS):
        yield image_id, method, fields["mask"]
