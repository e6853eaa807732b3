"""Rows of all images of a run, streamed → pages of rows in the orders in which the report's table of images shows them.

A page of rows is loaded when the table shows one of them, so that a report of a million images opens as quickly as one of a
hundred. A list of rows in another order, or of those with a reason, has pages of its own: one page is loaded, not many.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.report import rows as audit_rows
from pipeline.report.scripts import as_script
from pipeline.stage_order import SPLIT_OF

PER_PAGE = 5000
DIGITS = 4
BY_QUALITY, BY_ID = "quality", "id"  # names of the lists of all rows; those of reasons are reason-0, reason-1 …


class ImageTable:
    """Rows of REVIEWED stages, to be added in id order. Their texts wait in a file; a row has some 30 bytes in memory.

    classes: names of the classes, which rows refer to by their positions.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        # in audit/<run>.csv a bar within a name is written %7C
        self._classes = {name.replace("|", "%7C"): at for at, name in enumerate(classes)}
        self._texts = tempfile.TemporaryFile()  # noqa: SIM115 write closes it
        self._ends = array("Q", [0])
        self._quality = array("d")
        self._reasons: dict[str, int] = {}  # in the order in which they are met first
        self._with_reason: list[array[int]] = []

    def add(self, row: audit_rows.Row) -> None:
        """ValueError where the row has a tag that is no class."""
        reasons = [self._reasons.setdefault(reason, len(self._reasons)) for reason in row.reasons]
        for at in reasons:
            if at == len(self._with_reason):
                self._with_reason.append(array("I"))
            self._with_reason[at].append(len(self._quality))
        self._quality.append(float("inf") if row.quality is None else row.quality)
        if unknown := [tag for tag in row.tags or () if tag not in self._classes]:
            raise ValueError(f"{row.id!r} has the tag {unknown[0]!r}, which is no class; run `dvc repro evaluate`")
        tags = None if row.tags is None else [self._classes[tag] for tag in row.tags]
        figures = (row.score, row.miou, row.method_agreement)
        rounded = (None if value is None else round(value, DIGITS) for value in figures)
        text = as_script([row.id, SPLIT_OF[row.stage], tags, *rounded, reasons]).encode("utf-8")
        self._texts.write(text)
        self._ends.append(self._ends[-1] + len(text))

    def write(self, folder: Path, name: str) -> dict[str, Any]:
        """<name>-<list>-0000.js … in `folder`: calls of tag2mask.rows. Returns what the page knows before it loads any:

        rows, per_page  how many there are, in all and in a page
        reasons         [reason, number of its rows], in the order of their lists
        first_ids       id of the first row of each page of the list by id
        """
        self._texts.flush()
        by_quality = np.argsort(np.asarray(self._quality), kind="stable")
        rank = np.empty(len(by_quality), np.uint32)
        rank[by_quality] = np.arange(len(by_quality), dtype=np.uint32)
        lists: dict[str, Sequence[int] | np.ndarray] = {BY_QUALITY: by_quality, BY_ID: range(len(by_quality))}
        for at, with_reason in enumerate(self._with_reason):
            members = np.asarray(with_reason)
            lists[f"reason-{at}"] = members[np.argsort(rank[members])]
        for list_name, members in lists.items():
            for page, start in enumerate(range(0, len(members), PER_PAGE)):
                self._write_page(folder / f"{name}-{list_name}-{page:04d}.js", members[start : start + PER_PAGE])
        first_ids = [json.loads(self._text(at))[0] for at in range(0, len(by_quality), PER_PAGE)]
        self._texts.close()
        counts = [[reason, len(self._with_reason[at])] for reason, at in self._reasons.items()]
        return {"rows": len(by_quality), "per_page": PER_PAGE, "reasons": counts, "first_ids": first_ids}

    def _write_page(self, path: Path, members: Sequence[int] | np.ndarray) -> None:
        texts = b",".join(self._text(int(at)) for at in members)
        path.write_bytes(f'tag2mask.rows("{path.stem}",['.encode() + texts + b"]);\n")

    def _text(self, at: int) -> bytes:
        return os.pread(self._texts.fileno(), self._ends[at + 1] - self._ends[at], self._ends[at])
