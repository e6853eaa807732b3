"""audit/<run>.csv of all runs, streamed → rows of the gallery's images, the worst rows, images outside the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pipeline.report import rows as audit_rows
from pipeline.report.method_agreement import Agreement


@dataclass(frozen=True)
class Audits:
    """By run, but for pair_agreement.

    pair_agreement  split → f64[m,m] agreement of two runs' masks; empty where there is one run
    gallery_rows    (id, stage) → row, of the gallery's images
    worst           of all images, ascending by quality
    outside_limits  (stage, quality indicator) → number of images of which it is out of its limits
    """

    pair_agreement: Mapping[str, np.ndarray]
    gallery_rows: dict[str, dict[tuple[str, str], audit_rows.Row]] = field(default_factory=dict)
    worst: dict[str, list[audit_rows.Row]] = field(default_factory=dict)
    outside_limits: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)


def read(
    folder: Path, methods: Sequence[str], gallery_ids: Iterable[str], count: int, agreement: Agreement | None
) -> Audits:
    """Reads each file once, row by row. count: of `worst`, per run; agreement: None where there is one run."""
    ids, audits = set(gallery_ids), Audits({} if agreement is None else agreement.pairs)
    for method in methods:
        of_method = {} if agreement is None else agreement.images[method]
        audits.gallery_rows[method], audits.outside_limits[method] = {}, Counter()
        rows = _with_agreement(audit_rows.read(folder / f"{method}.csv"), of_method)
        collected = _collected(rows, ids, audits.gallery_rows[method], audits.outside_limits[method])
        audits.worst[method] = audit_rows.worst(collected, count)
    return audits


def _with_agreement(rows: Iterable[audit_rows.Row], agreement: Mapping[str, tuple[float, int]]) -> Iterator[audit_rows.Row]:
    for row in rows:
        if row.stage in audit_rows.REVIEWED and row.id in agreement:
            value, compared = agreement[row.id]
            row = replace(row, method_agreement=value, compared=compared)
        yield row


def _collected(
    rows: Iterable[audit_rows.Row],
    ids: set[str],
    gallery_rows: dict[tuple[str, str], audit_rows.Row],
    outside_limits: Counter[tuple[str, str]],
) -> Iterator[audit_rows.Row]:
    """Passes the rows on; on the way it puts those of `ids` into gallery_rows and counts the reasons in outside_limits."""
    for row in rows:
        if row.id in ids:
            gallery_rows[row.id, row.stage] = row
        outside_limits.update({(row.stage, reason.partition(":")[0]) for reason in row.reasons})
        yield row
