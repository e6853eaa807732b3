"""Image records as columns: about 100 bytes an image in arrays, where a list of objects takes 700."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from pipeline.core.ids import Ids, encode

SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageRecord:
    """A usable image.

    path    of the image file, POSIX, relative to dataset.root; of one in a tar shard `<shard>.tar/<name in it>`
    size    (H, W) px of the upright image
    split   of SPLITS
    tags    class indices from 0, ascending; (): no class is present; None: untagged
    sha256  of the image file, 32 bytes
    offset  bytes before the image file in its shard
    length  of the image file there, in bytes; None: it lies in no shard
    """

    id: str
    path: str
    size: tuple[int, int]
    split: str
    tags: tuple[int, ...] | None
    sha256: bytes
    offset: int = 0
    length: int | None = None


class RecordTable(Sequence[ImageRecord]):
    """`table[i]` makes an ImageRecord as it is asked for; a slice is a table that shares the arrays. Ascending by id.

    columns      arrays by name, a row per image: ids and paths S[n], size u4[n,2], split and tagged u1[n], sha256 u1[n,32];
                 offset and length u8[n] where images lie in shards, length 0 for those that do not
    tags         class indices of all images, end to end
    tags_offset  i8[n+1]: tags[tags_offset[i]:tags_offset[i+1]] are those of image i
    """

    def __init__(self, columns: Mapping[str, np.ndarray], tags: np.ndarray, tags_offset: np.ndarray) -> None:
        self.columns, self.tags, self.tags_offset = columns, tags, tags_offset

    @staticmethod
    def of(records: Iterable[ImageRecord]) -> RecordTable:
        """Records in any order."""
        if isinstance(records, RecordTable):
            return records
        rows = sorted(records, key=lambda record: record.id)
        tags = [record.tags or () for record in rows]
        sha256 = b"".join(record.sha256.ljust(32, b"\0") for record in rows)
        columns = {
            "ids": encode([record.id for record in rows]),
            "paths": encode([record.path for record in rows]),
            "size": np.array([record.size for record in rows], np.uint32).reshape(-1, 2),
            "split": np.array([SPLITS.index(record.split) for record in rows], np.uint8),
            "tagged": np.array([record.tags is not None for record in rows], np.uint8),
            "sha256": np.frombuffer(sha256, np.uint8).reshape(-1, 32),
        }
        if any(record.length is not None for record in rows):
            columns["offset"] = np.array([record.offset for record in rows], np.uint64)
            columns["length"] = np.array([record.length or 0 for record in rows], np.uint64)
        flat = np.array([tag for row in tags for tag in row], np.uint16)
        return RecordTable(columns, flat, np.cumsum([0, *map(len, tags)]))

    @staticmethod
    def joined(tables: Sequence[RecordTable]) -> RecordTable:
        """All records of some tables, each ascending and after the one before it."""
        if not tables:
            return RecordTable.of([])
        names = dict.fromkeys(name for table in tables for name in table.columns)
        columns = {name: np.concatenate([table.column(name) for table in tables]) for name in names}
        counts = np.concatenate([np.diff(table.tags_offset) for table in tables])
        return RecordTable(columns, np.concatenate([table.tags for table in tables]), np.cumsum([0, *counts]))

    @property
    def ids(self) -> Ids:
        return Ids(self.columns["ids"])

    def column(self, name: str) -> np.ndarray:
        """One of columns; zeros for offset and length where no image lies in a shard."""
        return self.columns[name] if name in self.columns else np.zeros(len(self), np.uint64)

    def sizes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(id, (H, W) px) of every image."""
        return ((image_id, (int(h), int(w))) for image_id, (h, w) in zip(self.ids, self.columns["size"], strict=True))

    def __len__(self) -> int:
        return len(self.columns["ids"])

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> RecordTable: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | RecordTable:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.select(np.arange(start, stop, step))
            columns = {name: values[start:stop] for name, values in self.columns.items()}
            return RecordTable(columns, self.tags, self.tags_offset[start : max(start, stop) + 1])
        index = range(len(self))[index]  # IndexError where there is none
        column = self.columns
        tags = self.tags[self.tags_offset[index] : self.tags_offset[index + 1]]
        length = int(column["length"][index]) if "length" in column else 0
        return ImageRecord(
            id=column["ids"][index].decode("utf-8"),
            path=column["paths"][index].decode("utf-8"),
            size=(int(column["size"][index, 0]), int(column["size"][index, 1])),
            split=SPLITS[column["split"][index]],
            tags=tuple(tags.tolist()) if column["tagged"][index] else None,
            sha256=column["sha256"][index].tobytes(),
            offset=int(column["offset"][index]) if length else 0,
            length=length or None,
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: np.ndarray) -> RecordTable:
        """A table of these rows, ascending numbers or bool[n]."""
        if rows.dtype == bool:
            if rows.all():
                return self
            rows = np.flatnonzero(rows)
        columns = {name: values[rows] for name, values in self.columns.items()}
        return RecordTable(columns, *tags_of(rows, self.tags, self.tags_offset))

    def of_split(self, name: str) -> RecordTable:
        """Images of a split of SPLITS."""
        return self.select(self.columns["split"] == SPLITS.index(name))

    def tagged(self) -> RecordTable:
        """Images that somebody tagged, also with no class."""
        return self.select(self.columns["tagged"] > 0)

    def with_classes(self) -> RecordTable:
        """Images that have a class."""
        return self.select(np.diff(self.tags_offset) > 0)

    def among(self, ids: Ids) -> RecordTable:
        """Images with one of these ids."""
        return self.select(is_among(self.columns["ids"], ids))

    def without(self, ids: Ids) -> RecordTable:
        """Images with none of these ids."""
        return self.select(~is_among(self.columns["ids"], ids))

    def __getstate__(self) -> dict[str, Any]:
        """Of a slice only its own tags: a worker gets its part."""
        first, last = int(self.tags_offset[0]), int(self.tags_offset[-1])
        return {"columns": self.columns, "tags": self.tags[first:last], "tags_offset": self.tags_offset - first}


def is_among(encoded: np.ndarray, ids: Ids) -> np.ndarray:
    """bool[n]: which of the ids S[n] are among `ids`."""
    others = ids.encoded
    if not len(others):
        return np.zeros(len(encoded), bool)
    places = np.minimum(np.searchsorted(others, encoded), len(others) - 1)  # np.isin would sort both again
    return others[places] == encoded


def tags_of(rows: np.ndarray, tags: np.ndarray, tags_offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RecordTable's tags and tags_offset for these rows alone, a number each."""
    counts = np.diff(tags_offset)[rows]
    offset = np.concatenate([[0], np.cumsum(counts)])
    places = np.repeat(tags_offset[:-1][rows] - offset[:-1], counts) + np.arange(offset[-1])
    return tags[places], offset


class Parts(Sequence[RecordTable]):
    """A table cut after every `size` images; a part is made as it is asked for. No images are one empty part."""

    def __init__(self, table: RecordTable, size: int) -> None:
        self._table, self._size = table, size

    def __len__(self) -> int:
        return max(1, -(-len(self._table) // self._size))

    @overload
    def __getitem__(self, index: int) -> RecordTable: ...
    @overload
    def __getitem__(self, index: slice) -> list[RecordTable]: ...
    def __getitem__(self, index: int | slice) -> RecordTable | list[RecordTable]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]  # IndexError where there is none
        return self._table[number * self._size : (number + 1) * self._size]


class RecordsById(Mapping[str, ImageRecord]):
    """Id → record, in id order, found by bisection."""

    def __init__(self, table: RecordTable) -> None:
        self._table, self._ids = table, table.ids

    def __getitem__(self, image_id: str) -> ImageRecord:
        row = self._ids.find(image_id) if isinstance(image_id, str) else None
        if row is None:
            raise KeyError(image_id)
        return self._table[row]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)
