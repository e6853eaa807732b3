"""Records (+ pseudo-masks) → batches. Augmentation depends on (seed, phase, epoch, id), not on workers or ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pipeline.core.contracts import Batch
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.store import Store
from pipeline.imaging import rand_augment, transforms
from pipeline.training.settings import Augment


def seed_of(*key: object) -> int:
    """63-bit seed from values whose str() is the same on every host."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, key)).encode("utf-8")).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Draw:
    """An image as it is drawn for a batch: its index in the records, and the number of the pass over them."""

    index: int
    epoch: int


def order(seed: int, phase: int, count: int, batch_size: int, step: int) -> list[Draw]:
    """The draws of step `step`: shuffled passes over `count` images follow one another, and each pass has every image."""
    draws = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        draws.append(Draw(int(_shuffled(seed, phase, epoch, count)[place]), epoch))
    return draws


_LAST_ORDER: dict[tuple[int, int, int, int], np.ndarray] = {}


def _shuffled(seed: int, phase: int, epoch: int, count: int) -> np.ndarray:
    key = (seed, phase, epoch, count)
    if key not in _LAST_ORDER:
        if (
            len(_LAST_ORDER) >= 4
        ):  # a step draws from two epochs at most, from more where a batch is larger than the data set
            _LAST_ORDER.clear()
        _LAST_ORDER[key] = np.random.default_rng(seed_of("order", seed, phase, epoch)).permutation(count)
    return _LAST_ORDER[key]


@dataclass(frozen=True)
class TrainingImages:
    """Records of training images under `root`, with their augmentation.

    classes: number of tags; masks: pseudo-masks, or None where images are trained with their tags alone.
    """

    records: Sequence[ImageRecord]
    root: Path
    classes: int
    augment: Augment
    seed: int
    masks: Store | None

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, phase: int, draws: Sequence[Draw]) -> Batch:
        """Decodes and augments the draws. Shapes as in contracts.Batch."""
        samples = [self._sample(phase, draw) for draw in draws]
        images, valid, masks = zip(*samples, strict=True)
        tags = np.zeros((len(draws), self.classes), np.float32)
        for row, draw in enumerate(draws):
            tags[row, list(self.records[draw.index].tags or ())] = 1
        return Batch(
            images=torch.from_numpy(np.stack(images)).clone(),
            tags=torch.from_numpy(tags),
            valid=torch.from_numpy(np.stack(valid)),
            masks=None if self.masks is None else torch.from_numpy(np.stack(masks)),
        )

    def _sample(self, phase: int, draw: Draw) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        record, augment = self.records[draw.index], self.augment
        rng = np.random.default_rng(seed_of(self.seed, phase, draw.epoch, record.id))
        image = read_image(record, self.root)
        mask = None if self.masks is None else self.masks.read(record.id, "mask")
        strong, box = augment.rand_augment, None
        scale = rng.uniform(augment.scale_min, augment.scale_max)
        flip, jitter = bool(rng.random() < augment.flip), 1 + augment.jitter * rng.uniform(-1, 1, 3)
        at = rng.random(), rng.random()
        if augment.area_min is not None:
            box = rand_augment.area_box(rng, record.size, augment.area_min)
        pixels, valid, labels = transforms.crop(
            image,
            mask,
            size=augment.size,
            scale=scale,
            flip=flip,
            jitter=jitter,
            at=at,
            box=box,
            change=None if strong is None else lambda window: rand_augment.rand_augment(window, rng, **vars(strong)),
        )
        if augment.erase > 0 and rng.random() < augment.erase:
            rand_augment.erase(pixels, rng)
        return pixels, valid, labels
