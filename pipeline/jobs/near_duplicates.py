"""Pixels of train and of val → images of val that are, or nearly are, an image of train. By a perceptual hash of 64 bits.

The hash is the difference hash: whether brightness rises from cell to cell, on a grid of 8 × 8. Scaling, compression and
small changes of colour leave it as it is, or change few bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import combinations

import numpy as np
from PIL import Image

from pipeline.core.problems import listed, quantity

SIDE = 8
NEAR = 4  # bits in which two hashes may differ
PLAIN = 8  # hashes with fewer ones, or zeros, are of plain images (a sky, a wall): all of them are alike
BANDS = (11, 11, 11, 11, 10, 10)  # bits; hashes that differ in 4 bits are equal in at least 2 of the 6
CHUNK = 1 << 20  # pairs that are compared at a time
NAMED = 10


def fingerprint(pixels: np.ndarray) -> int:
    """u8[h,w,3] RGB → hash of 64 bits; 0 for an image too plain to have one."""
    small = Image.fromarray(pixels).convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX)
    brightness = np.asarray(small).astype(np.int16)
    bits = (brightness[:, 1:] > brightness[:, :-1]).ravel()
    if not PLAIN <= bits.sum() <= bits.size - PLAIN:
        return 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def nearest(train: np.ndarray, val: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hashes u64[n] and u64[m] → per image of val a hash of train at most NEAR bits away, i64[m] its index or -1, and i64[m]
    the bits in which they differ.

    Hashes are sorted by each pair of their bands, and only those with equal bands are compared: n + m instead of n × m. An
    image with a match is not looked for again, so the match is near, and need not be the nearest. 0 matches nothing.
    """
    hashes, first = np.unique(train, return_index=True)
    index, distance = np.full(len(val), -1), np.full(len(val), NEAR + 1)
    for mask in _band_masks():
        open_ones = np.flatnonzero((index < 0) & (val != 0))
        if not len(open_ones):
            break
        order = np.argsort(hashes & mask, kind="stable")
        keys, wanted = (hashes & mask)[order], val[open_ones] & mask
        start, stop = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
        for rows, places in _pairs(start, stop):
            at, candidate = open_ones[rows], order[places]
            bits = np.bitwise_count(val[at] ^ hashes[candidate]).astype(np.int64)
            best = np.lexsort((candidate, bits))[::-1]  # the nearest is written last
            best = best[(bits[best] <= NEAR) & (bits[best] < distance[at[best]]) & (hashes[candidate[best]] != 0)]
            index[at[best]], distance[at[best]] = first[candidate[best]], bits[best]
    return index, distance


def _band_masks() -> list[np.uint64]:
    ends = np.cumsum(BANDS)
    bands = [((1 << width) - 1) << (int(end) - width) for width, end in zip(BANDS, ends, strict=True)]
    return [np.uint64(one | other) for one, other in combinations(bands, 2)]


def _pairs(start: np.ndarray, stop: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Row r with each place of start[r]..stop[r], about CHUNK pairs at a time: (i64[k] rows, i64[k] places)."""
    lengths = stop - start
    blocks = np.cumsum(lengths) // CHUNK
    for rows in np.split(np.arange(len(lengths)), np.flatnonzero(np.diff(blocks)) + 1):
        counts = lengths[rows]
        if counts.sum():
            offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield np.repeat(rows, counts), np.repeat(start[rows], counts) + offsets


class Fingerprints:
    """Hashes of all images, 8 bytes each, by split."""

    def __init__(self) -> None:
        self._hashes = {"train": array("Q"), "val": array("Q")}
        self._ids: dict[str, list[str]] = {"train": [], "val": []}

    def add(self, image_id: str, split: str, value: int) -> None:
        self._hashes[split].append(value)
        self._ids[split].append(image_id)

    def warnings(self) -> list[str]:
        """A text that counts the images of val that train shows too, and names the first; [] where there is none."""
        train, val = (np.array(self._hashes[split], np.uint64) for split in ("train", "val"))
        index, distance = nearest(train, val)
        pairs = [
            f"{self._ids['val'][row]!r} and {self._ids['train'][index[row]]!r} ({_likeness(int(distance[row]))})"
            for row in np.flatnonzero(index >= 0)
        ]
        if not pairs:
            return []
        return [
            f"{quantity(len(pairs), 'image')} of split val look like one of split train, which makes figures on val too "
            f"good: {listed(pairs, ', ', NAMED)}; give both the same split, or remove one"
        ]


def _likeness(bits: int) -> str:
    return "the same hash" if bits == 0 else f"{quantity(bits, 'bit')} of 64 differ"
