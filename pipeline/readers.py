"""pseudo_masks/, the product → its reader (docs/pseudo_masks.md). Export writes it always, part by part, so no `write` is here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core import store


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
