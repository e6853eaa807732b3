"""Pseudo-masks → tasks.json of Label Studio, one brush region per class and image, and its labelling interface. Lossless.

A region is in the RLE of Label Studio's brush (thi.ng's rle-pack, https://github.com/thi-ng/umbrella): a bit stream of the
mask's RGBA bytes, 4 per pixel, all 0 or all 255. 255 is the label `ignore`. Regions are predictions, which annotators accept
or correct.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.core.labels import BACKGROUND
from pipeline.core.records import Records
from pipeline.mask_files import hex_of, legend

WORD = 8  # bits of a value
LENGTHS = np.array([3, 4, 8, 16])  # bits in which a run's length can be stored
CHANNELS = 4
LONGEST = 2**16  # values in one run
ROOT = "/data/local-files/?d="  # Label Studio's own address of files under LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Streams task by task. data.image is the URL at which Label Studio serves the path under dataset.root."""
    out.mkdir(parents=True, exist_ok=True)
    by_id, names = records.by_id(), legend(records.labels)
    with (out / "tasks.json").open("w", encoding="utf-8", newline="\n") as file:
        file.write("[")
        for number, (image_id, mask) in enumerate(masks, 1):
            regions = [
                _region(mask, value, names[value], number) for value in np.unique(mask).tolist() if value != BACKGROUND
            ]
            task = {
                "data": {"image": ROOT + quote(by_id[image_id].path), "tag2mask_id": image_id},
                "predictions": [{"model_version": "tag2mask", "result": regions}],
            }
            file.write(("\n" if number == 1 else ",\n") + json.dumps(task))
        file.write("\n]\n")
    rows = [
        f"    <Label value={quoteattr(names[value])} background={quoteattr(hex_of(value))}/>" for value in names if value
    ]
    (out / "labels.xml").write_text(
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="tag" toName="image">\n'
        + "\n".join(rows)
        + "\n  </BrushLabels>\n</View>\n",
        encoding="utf-8",
    )


def _region(mask: np.ndarray, value: int, name: str, number: int) -> dict[str, Any]:
    h, w = mask.shape
    return {
        "id": f"{number}-{value}",
        "type": "brushlabels",
        "from_name": "tag",
        "to_name": "image",
        "original_width": w,
        "original_height": h,
        "image_rotation": 0,
        "value": {"format": "rle", "rle": list(encode(mask == value)), "brushlabels": [name]},
    }


def encode(region: np.ndarray) -> bytes:
    """bool[h,w] → bytes of rle-pack.

    Header: number of values (32 bits), bits per value - 1 (5 bits), then the four entries of LENGTHS - 1 (4 bits each). Per
    run: a 1, the index of its length's width in LENGTHS (2 bits), length - 1, value. Runs of literal values (a 0) are never
    shorter here, since a pixel is 4 equal values.
    """
    flat = region.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size)) * CHANNELS
    pieces = -(-lengths // LONGEST)
    values = np.repeat(flat[starts], pieces)
    runs = np.full(pieces.sum(), LONGEST)
    ends = np.cumsum(pieces) - 1
    runs[ends] = lengths - (pieces - 1) * LONGEST
    widths = np.searchsorted(2**LENGTHS, runs)  # index in LENGTHS
    codes = ((((1 << 2) | widths) << LENGTHS[widths]) | (runs - 1)) << WORD | np.where(values, 2**WORD - 1, 0)
    header = _bits(np.array([flat.size * CHANNELS, WORD - 1, *(LENGTHS - 1)]), np.array([32, 5, 4, 4, 4, 4]))
    return np.packbits(np.concatenate([header, _bits(codes, 3 + LENGTHS[widths] + WORD)])).tobytes()


def _bits(numbers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Numbers i64[n] and widths i64[n] in bits → u8[sum of widths], the concatenated bits, most significant first."""
    widest = int(widths.max())
    places = np.arange(widest - 1, -1, -1)
    bits = (numbers[:, None] >> places) & 1
    return bits[places < widths[:, None]].astype(np.uint8)
