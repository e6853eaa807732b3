"""A trained method + some images → pictures of its inner maps and its weights by layer and head, for the report."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import store
from pipeline.core.records import ImageRecord, read_image
from pipeline.imaging import planes, sheet, transforms

HEIGHT = 128  # px of a strip
LONGEST = 512  # px of the long side that a method looks inside at: inner maps grow with its fourth power
WEIGHTS = "_weights"  # inner tensors whose names end so are tables by layer and head


def chosen(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """`count` images of split train that have a class, fixed by their ids, in id order."""
    tagged = [record for record in records if record.split == "train" and record.tags]
    some = sorted(tagged, key=lambda record: hashlib.sha256(record.id.encode("utf-8")).digest())[:count]
    return sorted(some, key=lambda record: record.id)


def inspections(
    records: Sequence[ImageRecord], method: Any, classes: int, root: Path, long_side: int | None, device: str
) -> Iterator[store.Item]:
    """INSPECTION items: the maps of each image's first class at scale 1 (long side at most LONGEST), each over its own maximum."""
    longest = LONGEST if long_side is None else min(long_side, LONGEST)
    for record in records:
        assert record.tags  # as `chosen` gives them
        photograph = read_image(record, root)
        view = transforms.resize(photograph, transforms.view_size(record.size, 1.0, method.stride, longest))
        batch = transforms.tensor_of(view, device)[None]
        found = {name: value[0].float().cpu().numpy() for name, value in method.inspect(batch).items()}
        maps = {name: value[record.tags[0]] for name, value in found.items() if value.ndim == 3 and len(value) == classes}
        tables = [value for name, value in found.items() if name.endswith(WEIGHTS)]
        small = transforms.resize(photograph, (HEIGHT, max(1, round(record.size[1] * HEIGHT / record.size[0]))))
        panels = [small, *(sheet.over(small, _relative(plane, small.shape[:2])) for plane in maps.values())]
        yield (
            record.id,
            {
                "jpeg": np.frombuffer(sheet.strip(panels, HEIGHT, smooth=len(panels)), np.uint8),
                "panels": np.frombuffer(",".join(["photograph", *maps]).encode("utf-8"), np.uint8),
                "weights": tables[0].astype(np.float32) if tables else np.zeros((0, 0), np.float32),
            },
        )


def _relative(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """f32[gh,gw] → f32[size] in 0..1: negative evidence is none; an empty map stays empty."""
    full = planes.upsample(np.maximum(plane, 0)[None], (size[0], size[1]))[0]
    return full / full.max() if full.max() > 0 else full
