"""One process of a training run, as steps and scoring see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.core.contracts import Batch, Phase
from pipeline.core.processes import StopRequest
from pipeline.training import precision
from pipeline.training.exchange import Exchange, block, block_size

FIGURES = 16  # numbers per shard that ranks tell each other, at most


@dataclass(frozen=True)
class Rank:
    """A rank's own copy of the trainable, which lies on `device`, and its way to the other ranks."""

    trainable: Any
    device: str
    precision: str
    seed: int  # of the run
    exchange: Exchange
    stop: StopRequest

    @property
    def is_first(self) -> bool:
        """Rank 0 alone writes."""
        return self.exchange.rank == 0

    def shards(self, phase: Phase) -> range:
        """The shards of each step that this rank computes."""
        return block(phase.shards, self.exchange.rank, self.exchange.ranks)

    def gather(self, phase: Phase, figures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """f64[k] of each own shard, k <= FIGURES → the same in every rank, on the device:

        f64[]                how many ranks were asked to stop
        f64[shards,FIGURES]  the figures of all shards, 0 behind those that were put in
        """
        row = torch.zeros(
            1 + block_size(phase.shards, self.exchange.ranks) * FIGURES, dtype=torch.float64, device=self.device
        )
        row[0] = float(self.stop.made)
        for at, values in enumerate(figures):
            row[1 + at * FIGURES :][: len(values)] = values
        rows = self.exchange.gather(row)
        return rows[:, 0].sum(), rows[:, 1:].reshape(-1, FIGURES)[: phase.shards]

    def autocast(self) -> torch.autocast:
        return precision.autocast(self.precision, self.device)

    def on_device(self, batch: Batch) -> Batch:
        return batch if self.device == "cpu" else batch.to(self.device)


def float_buffers(trainable: Any) -> list[Tensor]:
    """Running statistics and the like, which shards change by their batches."""
    return [buffer for buffer in trainable.buffers() if buffer.is_floating_point()]
