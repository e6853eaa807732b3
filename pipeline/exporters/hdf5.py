"""The product: pseudo_masks/, an HDF5 store, and its reader (docs/pseudo_masks.md)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core import store
from pipeline.core.labels import LabelSpace


class PseudoMasks:
    """`len(masks)`, `masks.ids`, `masks.labels`, `masks[id]` → u8[h,w]: 0 background, i + 1 = labels.names[i], 255 ignore."""

    def __init__(self, folder: Path | str) -> None:
        self._store = store.Store(Path(folder), store.PSEUDO_MASKS)
        self.ids = self._store.ids
        self.labels = self._store.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, image_id: str) -> np.ndarray:
        return self._store.read(image_id, "mask")


def write(masks: Iterator[tuple[str, np.ndarray]], labels: LabelSpace, out: Path) -> None:
    """A second copy of the store, as one part; export itself has written pseudo_masks/ already."""
    items = ((image_id, {"mask": mask}) for image_id, mask in masks)
    store.write_part(
        store.part_path(out, 0),
        store.PSEUDO_MASKS,
        items,
        labels=labels,
        part=0,
        parts=1,
        params_digest="",
        compression="gzip",
    )
