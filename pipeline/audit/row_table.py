"""Rows of the audit as columns: about 150 bytes per image and stage, where objects take four times as much."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from pipeline.audit.indicators import INDICATORS
from pipeline.core.ids import encode
from pipeline.core.record_table import tags_of
from pipeline.stage_order import STAGES

FIGURES = ("miou", "corrected", "broken")


@dataclass(frozen=True, slots=True)
class Row:
    """One image at one stage.

    truth       whether the image has a true mask
    miou        the image's own, 0..1; NaN without truth
    corrected   fraction of the pixels that were wrong at the stage before and are right; NaN without truth or such a stage
    broken      the same of those that were right and are wrong
    indicators  f32[len(INDICATORS)], in their order
    shares      (mask value, share of the image's pixels) of the tagged and the present classes
    """

    id: str
    stage: str
    truth: bool
    miou: float
    corrected: float
    broken: float
    indicators: np.ndarray
    shares: tuple[tuple[int, float], ...]

    def by_name(self) -> dict[str, float]:
        """Indicator → its value; NaN where it does not apply."""
        return dict(zip(INDICATORS, map(float, self.indicators), strict=True))


class RowTable(Sequence[Row]):
    """`table[i]` makes a Row as it is asked for. By id, then by stage in the order of STAGES.

    columns    arrays by name, a row each: ids S[n], stage u1[n] its place in STAGES, truth bool[n], FIGURES f64[n],
               indicators f32[n,len(INDICATORS)]
    values     u1[m] mask values of the shares of all rows, end to end
    fractions  f64[m] these shares
    offset     i64[n+1]: values[offset[i]:offset[i+1]] are those of row i
    """

    def __init__(
        self, columns: Mapping[str, np.ndarray], values: np.ndarray, fractions: np.ndarray, offset: np.ndarray
    ) -> None:
        self.columns, self.values, self.fractions, self.offset = columns, values, fractions, offset

    @staticmethod
    def of(rows: Iterable[Row]) -> RowTable:
        """Rows in any order."""
        listed = list(rows)
        shares = [share for row in listed for share in row.shares]
        columns = {
            "ids": encode([row.id for row in listed]),
            "stage": np.array([STAGES.index(row.stage) for row in listed], np.uint8),
            "truth": np.array([row.truth for row in listed], bool),
            **{name: np.array([getattr(row, name) for row in listed], np.float64) for name in FIGURES},
            "indicators": np.array([row.indicators for row in listed], np.float32).reshape(-1, len(INDICATORS)),
        }
        values = np.array([value for value, _ in shares], np.uint8)
        fractions = np.array([fraction for _, fraction in shares], np.float64)
        return RowTable(columns, values, fractions, np.cumsum([0, *(len(row.shares) for row in listed)]))._ordered()

    @staticmethod
    def joined(tables: list[RowTable]) -> RowTable:
        """All rows of some tables, which are emptied as they are joined, so that nothing is held twice."""
        if not tables:
            return RowTable.of([])
        offset = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(table.offset) for table in tables]))])
        values, fractions = (np.concatenate([getattr(t, name) for t in tables]) for name in ("values", "fractions"))
        parts = [dict(table.columns) for table in tables]
        tables.clear()
        columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in tuple(parts[0])}
        return RowTable(columns, values, fractions, offset)._ordered()

    def _ordered(self) -> RowTable:
        order = np.lexsort((self.columns["stage"], self.columns["ids"]))
        return self if np.array_equal(order, np.arange(len(self))) else self.select(order)

    def select(self, rows: np.ndarray) -> RowTable:
        """A table of the rows with these numbers."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        values, offset = tags_of(rows, self.values, self.offset)
        return RowTable(columns, values, tags_of(rows, self.fractions, self.offset)[0], offset)

    def __len__(self) -> int:
        return len(self.columns["ids"])

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> RowTable: ...
    def __getitem__(self, index: int | slice) -> Row | RowTable:
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        index = range(len(self))[index]  # IndexError where there is none
        column, shares = self.columns, slice(self.offset[index], self.offset[index + 1])
        return Row(
            id=column["ids"][index].decode("utf-8"),
            stage=STAGES[column["stage"][index]],
            truth=bool(column["truth"][index]),
            miou=float(column["miou"][index]),
            corrected=float(column["corrected"][index]),
            broken=float(column["broken"][index]),
            indicators=column["indicators"][index],
            shares=tuple(zip(self.values[shares].tolist(), self.fractions[shares].tolist(), strict=True)),
        )

    @property
    def stages(self) -> list[str]:
        """Stages that an image has, in the order of STAGES."""
        return [STAGES[place] for place in np.flatnonzero(np.bincount(self.columns["stage"], minlength=len(STAGES)))]

    def is_of(self, stage: str) -> np.ndarray:
        """bool[n]: the rows of a stage."""
        return self.columns["stage"] == STAGES.index(stage)

    def of_stage(self, stage: str) -> RowTable:
        return self.select(np.flatnonzero(self.is_of(stage)))

    def of_image(self, image_id: str) -> RowTable:
        """The stages of an image; none where it is not known."""
        ids, encoded = self.columns["ids"], image_id.encode("utf-8")
        return self[bisect_left(ids, encoded) : bisect_right(ids, encoded)]

    def column(self, name: str, stage: str) -> np.ndarray:
        """A column of the rows of one stage."""
        return self.columns[name][self.is_of(stage)]

    def shares(self, stage: str) -> Iterator[tuple[int, float]]:
        """(mask value, share of its image's pixels), over the rows of one stage."""
        chosen = np.repeat(self.is_of(stage), np.diff(self.offset))
        return zip(self.values[chosen].tolist(), self.fractions[chosen].tolist(), strict=True)
