"""Pseudo-masks of stage export → readers for other training code (docs/pseudo_masks.md). No stage imports them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.core import records, store

if TYPE_CHECKING:
    from torch import Tensor


class PseudoMasks:
    """`masks[id]` → u8[h,w] mask values: 0 background, i + 1 = labels.names[i], 255 ignore. Iterates over its sorted ids.

    folder is artifacts/<run>/pseudo_masks. StoreError where it is no complete store, or holds no such id.
    """

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


class PseudoMaskDataset:
    """A map-style data set for torch's DataLoader; item i is (u8[3,h,w] RGB, u8[h,w] mask values as in PseudoMasks), by id.

    records_file is data/records.h5, masks_folder artifacts/<run>/pseudo_masks, root the params' dataset.root.
    Sizes differ from image to image: crop or pad before batching. ValueError if a mask has no record.
    """

    def __init__(self, records_file: Path, masks_folder: Path, root: Path) -> None:
        self.root = Path(root)
        self._masks = PseudoMasks(masks_folder)
        by_id = records.read(Path(records_file)).by_id()
        unknown = [image_id for image_id in self._masks.ids if image_id not in by_id]
        if unknown:
            raise ValueError(f"{len(unknown)} masks of {masks_folder} are not in {records_file}: {unknown[:5]}")
        self._records = [by_id[image_id] for image_id in self._masks.ids]
        self.ids = self._masks.ids
        self.labels = self._masks.labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import torch  # PseudoMasks is read without it

        record = self._records[index]
        image = np.array(records.read_image(record, self.root).transpose(2, 0, 1), order="C")
        return torch.from_numpy(image), torch.from_numpy(self._masks[record.id])
