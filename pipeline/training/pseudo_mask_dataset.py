"""Pseudo-masks + photographs → a torch data set of (image, mask), for training that is not ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.core import records, store


class PseudoMaskDataset(Dataset[tuple[Tensor, Tensor]]):
    """Item i is (u8[3,h,w] RGB, u8[h,w] mask values: 0 background, i + 1 = labels.names[i], 255 ignore), in id order.

    records_file is data/records.h5, masks_folder artifacts/<method>/pseudo_masks, root the params' dataset.root.
    Sizes differ from image to image: crop or pad before batching. ValueError if a mask has no record.
    """

    def __init__(self, records_file: Path, masks_folder: Path, root: Path) -> None:
        self.root = Path(root)
        self._masks = store.Store(Path(masks_folder), store.PSEUDO_MASKS)
        by_id = records.read(Path(records_file)).by_id()
        strangers = [image_id for image_id in self._masks.ids if image_id not in by_id]
        if strangers:
            raise ValueError(f"{len(strangers)} masks of {masks_folder} are not in {records_file}: {strangers[:5]}")
        self._records = [by_id[image_id] for image_id in self._masks.ids]
        self.labels = self._masks.labels

    @property
    def ids(self) -> list[str]:
        return self._masks.ids

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        record = self._records[index]
        image = np.array(records.read_image(record, self.root).transpose(2, 0, 1), order="C")
        return torch.from_numpy(image), torch.from_numpy(self._masks.read(record.id, "mask"))
