"""What ranks (processes) put in for each shard of a step → its sum over shards, in every rank.

Sums are made in shard order, so the bytes do not depend on how many ranks share the shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from threading import BrokenBarrierError
from typing import Protocol

import torch
import torch.multiprocessing as processes
from torch import Tensor

FIGURES = 16  # at most, per shard
ANSWER_SECONDS = 3600.0  # the longest step that a rank waits for


@dataclass(frozen=True)
class Gathered:
    """A round's result, the same in every rank.

    sums     f32[n] on CPU, the tensors of a shard laid end to end, summed over shards
    figures  f64[shards, FIGURES] on CPU; 0 behind the figures that were put in
    """

    sums: Tensor
    figures: Tensor


class OtherRankFailed(RuntimeError):
    """The exchange has ended because another rank failed, or gave no answer."""


class Exchange(Protocol):
    """Rounds of put and gather. In each round every rank puts in its own shards, and together they put in all of them."""

    def put(self, shard: int, tensors: Iterable[Tensor], figures: Tensor) -> None:
        """tensors: float, any shapes and device, the same for every shard of the round; figures: f64[k], k <= FIGURES."""
        ...

    def gather(self, shards: int, size: int) -> Gathered:
        """Waits for all ranks and ends the round. size: elements of a shard's tensors. OtherRankFailed if a rank did."""
        ...

    def abort(self) -> None:
        """This rank has failed: the gather of every other rank raises, now or when it is called."""
        ...


class SharedMemory:
    """An Exchange of processes on one host, picklable to them as they start.

    Even and odd rounds have memory of their own. So one meeting per round is enough: what a rank reads after it is
    written again only after the next meeting, which that rank attends when it has read.
    """

    def __init__(self, *, ranks: int, shards: int, size: int) -> None:
        """shards and size: the most of any round."""
        self._tensors = torch.zeros(2, shards, size)
        self._figures = torch.zeros(2, shards, FIGURES, dtype=torch.float64)
        self._barrier = None
        self._parity = 0
        if ranks > 1:
            self._barrier = processes.get_context("spawn").Barrier(ranks)
            self._tensors.share_memory_()
            self._figures.share_memory_()

    def put(self, shard: int, tensors: Iterable[Tensor], figures: Tensor) -> None:
        row, start = self._tensors[self._parity, shard], 0
        for tensor in tensors:
            row[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)
            start += tensor.numel()
        self._figures[self._parity, shard].zero_()
        self._figures[self._parity, shard, : len(figures)] = figures

    def gather(self, shards: int, size: int) -> Gathered:
        if self._barrier is not None:
            try:
                self._barrier.wait(timeout=ANSWER_SECONDS)
            except BrokenBarrierError as error:
                raise OtherRankFailed(
                    f"another training process failed or gave no answer for {ANSWER_SECONDS:g} s"
                ) from error
        rows = self._tensors[self._parity, :shards, :size]
        sums = rows[0].clone()
        for row in rows[1:]:
            sums += row
        figures = self._figures[self._parity, :shards].clone()
        self._parity = 1 - self._parity
        return Gathered(sums, figures)

    def abort(self) -> None:
        if self._barrier is not None:
            self._barrier.abort()
