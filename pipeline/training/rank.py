"""One process of a training run, as steps and scoring see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.contracts import Batch, Phase
from pipeline.training import precision
from pipeline.training.exchange import Exchange


@dataclass(frozen=True)
class Rank:
    """number of count; its own copy of the trainable, which lies on `device`; its way to the other ranks."""

    number: int
    count: int
    trainable: Any
    device: str
    precision: str
    seed: int  # of the run
    exchange: Exchange

    def shards(self, phase: Phase) -> range:
        """The shards of each step that this rank computes."""
        return range(self.number, phase.shards, self.count)

    def autocast(self) -> torch.autocast:
        return precision.autocast(self.precision, self.device)

    def on_device(self, batch: Batch) -> Batch:
        if self.device == "cpu":
            return batch
        return Batch(
            images=batch.images.to(self.device, non_blocking=True),
            tags=batch.tags.to(self.device, non_blocking=True),
            valid=batch.valid.to(self.device, non_blocking=True),
            masks=None if batch.masks is None else batch.masks.to(self.device, non_blocking=True),
        )


def float_buffers(trainable: Any) -> list[Tensor]:
    """Running statistics and the like, which shards change by their batches."""
    return [buffer for buffer in trainable.buffers() if buffer.is_floating_point()]
