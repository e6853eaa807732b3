"""A rank's batches of a phase, decoded in line or ahead by threads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from pipeline.core.contracts import Batch, Phase
from pipeline.training.data import TrainingImages, order


@dataclass(frozen=True)
class Loader:
    """number: the phase's place in the run, from 0; shards: those of each step that the rank computes.

    pinned: whether batches lie in memory from which a GPU copies while the host goes on.
    """

    images: TrainingImages
    seed: int
    phase: Phase
    number: int
    shards: Sequence[int]
    pinned: bool

    def batches(self, steps: range, threads: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, a batch per shard) for consecutive steps. threads: 0 decodes in line."""
        if threads == 0:
            for step in steps:
                yield step, [self._batch(step, shard) for shard in self.shards]
            return
        ahead = 2 + threads // max(1, len(self.shards))
        with ThreadPoolExecutor(threads) as pool:

            def submit(step: int) -> list[Future[Batch]]:
                return [pool.submit(self._batch, step, shard) for shard in self.shards]

            waiting = {step: submit(step) for step in steps[:ahead]}
            for step in steps:
                if step + ahead in steps:
                    waiting[step + ahead] = submit(step + ahead)
                yield step, [future.result() for future in waiting.pop(step)]

    def _batch(self, step: int, shard: int) -> Batch:
        size = self.phase.batch_size // self.phase.shards
        draws = order(self.seed, self.number, len(self.images), self.phase.batch_size, step)
        batch = self.images.batch(self.number, draws[shard * size : (shard + 1) * size])
        if not self.pinned:
            return batch
        return Batch(
            images=batch.images.pin_memory(), tags=batch.tags.pin_memory(), valid=batch.valid.pin_memory(),
            masks=None if batch.masks is None else batch.masks.pin_memory(),
        )  # fmt: skip
