"""Sorted image ids in one array, a few bytes each: a million Python strings would take 80 MB and a second."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np


class Ids(Sequence[str]):
    """`ids[i]` → str, a slice → Ids; `in` and `find` take log2(n) steps. encoded: S[n] in UTF-8, ascending and unique.

    UTF-8 sorts as code points do, so that the order is Python's order of the strings.
    """

    def __init__(self, encoded: np.ndarray) -> None:
        self.encoded = encoded

    @staticmethod
    def of(ids: Iterable[str]) -> Ids:
        """Any ids, sorted; those that stand twice are kept twice."""
        return ids if isinstance(ids, Ids) else Ids(np.sort(encode(list(ids))))

    def __len__(self) -> int:
        return len(self.encoded)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Ids: ...
    def __getitem__(self, index: int | slice) -> str | Ids:
        if isinstance(index, slice):
            return Ids(self.encoded[index])
        return self.encoded[index].decode("utf-8")

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self.find(image_id) is not None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return np.array_equal(self.encoded, other.encoded)
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ids({list(self[:5])}{'' if len(self) <= 5 else f' and {len(self) - 5} more'})"

    def find(self, image_id: str) -> int | None:
        """The place of an id, or None."""
        encoded = image_id.encode("utf-8", "surrogatepass")
        place = bisect_left(self.encoded, encoded)  # NumPy's searchsorted would cast the array to the width of the id
        return place if place < len(self) and self.encoded[place] == encoded else None


def encode(texts: Sequence[str]) -> np.ndarray:
    """Texts → S[n] of UTF-8; HDF5 does not compress variable-length types."""
    encoded = [text.encode("utf-8") for text in texts]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")
