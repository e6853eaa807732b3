"""audit/<run>.csv, one row per image and stage → rows; the worst of them → review.csv."""

from __future__ import annotations

import csv
import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.stage_order import LAST

COLUMNS = ("id", "stage", "miou", "score", "reasons")  # what is read; quality indicators and further columns may follow
REVIEWED = tuple(LAST.values())
HEADER = ("id", "method", "stage", "score", "method_agreement", "reasons")
# runs that a mask must be compared with before its method agreement counts: with only two runs, both masks of a pair have
# the same agreement, so a good mask beside a bad one would rank as low as the bad one
MIN_COMPARED = 2
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


@dataclass(frozen=True, slots=True)
class Row:
    """One image at one stage.

    miou              of the image's mask, 0..1; None without truth
    score             label-free quality, 0..1; None for a stage that has none
    reasons           quality indicators that are out of their limits, and empty:<class>, coverage:<class>
    method_agreement  mean IoU of a mask of a REVIEWED stage with the masks of the other runs that have the image, mean over
                      these runs, 0..1; None where no other run has the image, and at other stages
    compared          number of these other runs
    tags              names of the tagged classes; None where nobody tagged the image
    """

    id: str
    stage: str
    miou: float | None
    score: float | None
    reasons: tuple[str, ...]
    method_agreement: float | None = None
    compared: int = 0
    tags: tuple[str, ...] | None = None

    @property
    def score_and_agreement(self) -> float | None:
        """Mean of score and method agreement, for pseudo-masks compared with MIN_COMPARED other runs, else None.

        There it ranks images better by their mIoU than the score alone does, by the measurements in docs/audit.md.
        """
        if (
            self.score is None
            or self.method_agreement is None
            or self.stage != "pseudo_masks"
            or self.compared < MIN_COMPARED
        ):
            return None
        return (self.score + self.method_agreement) / 2

    @property
    def quality(self) -> float | None:
        """What rows are ranked by: the first of score_and_agreement, score and mIoU that the row has."""
        return next((value for value in (self.score_and_agreement, self.score, self.miou) if value is not None), None)


def read(path: Path) -> Iterator[Row]:
    """Streams the rows of one run. FileNotFoundError, or ValueError naming file and line of what is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `dvc repro evaluate`")
    with path.open(encoding="utf-8", newline="") as file:
        yield from parse(file, str(path))


def parse(file: Iterable[str], name: str) -> Iterator[Row]:
    """Lines of such a table → rows; name: of the table, for errors."""
    lines = csv.reader(file)
    positions = {column: at for at, column in enumerate(next(lines, []))}
    if missing := [column for column in COLUMNS if column not in positions]:
        raise ValueError(f"{name} lacks the columns {', '.join(missing)}; run `dvc repro evaluate`")
    at_id, at_stage, at_miou, at_score, at_reasons = (positions[column] for column in COLUMNS)
    at_tags = positions.get("tags")
    for line in lines:
        try:
            yield Row(
                line[at_id], line[at_stage], _number(line[at_miou]), _number(line[at_score]), _words(line[at_reasons]),
                tags=None if at_tags is None or line[at_tags] == "?" else _words(line[at_tags]),
            )  # fmt: skip
        except (ValueError, IndexError) as error:
            raise ValueError(f"{name}, line {lines.line_num}: {error}; run `dvc repro evaluate`") from error


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split("|")) if text else ()


def _number(text: str) -> float | None:
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None


class Worst:
    """The `count` rows of the lowest quality among those of REVIEWED stages; memory does not grow with the rows."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._rows: list[Row] = []

    def add(self, row: Row) -> None:
        if row.stage not in REVIEWED or row.quality is None:
            return
        self._rows.append(row)
        if len(self._rows) > 2 * self.count + 1000:
            self._rows = self.rows()

    def rows(self) -> list[Row]:
        """In ascending order of quality."""
        return heapq.nsmallest(self.count, self._rows, key=lambda row: (row.quality, row.id, row.stage))


def write_review(path: Path, worst_rows: Mapping[str, Sequence[Row]]) -> None:
    """review.csv: method → its worst rows. Texts that a spreadsheet would take for a formula start with an apostrophe."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for method, rows in worst_rows.items():
            for row in rows:
                texts = (row.id, method, row.stage)
                score = row.score if row.score is not None else row.miou
                writer.writerow(
                    [*map(safe_cell, texts), _cell(score), _cell(row.method_agreement), safe_cell("|".join(row.reasons))]
                )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def safe_cell(text: str) -> str:
    """An apostrophe before what could start a formula, also behind blanks; other texts stay as they are."""
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) or text.startswith("'") else text
