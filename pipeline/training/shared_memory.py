"""Ranks of one host and its CPU: an Exchange through shared memory, with a pipe between rank 0 and every other rank.

A rank's memory is its row of one shared tensor, so nothing is packed or copied before it is summed. The operating system
closes the pipe of a process that ends, however it ends: those who wait for it learn it at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

import torch
import torch.multiprocessing as processes
from torch import Tensor

from pipeline.training.exchange import OtherRankFailed, tree_sum

ANSWER_SECONDS = 3600.0  # the longest step that a rank waits for
SHARED_MEMORY = Path("/dev/shm")  # where Linux has it


class SharedMemory:
    """One rank's end, picklable to its process as it starts."""

    def __init__(self, rank: int, rows: Tensor, pipes: Sequence[connection.Connection]) -> None:
        """rows: f32[ranks,n], shared; pipes: of rank 0 to every other rank, of these to rank 0."""
        self.rank, self.ranks = rank, len(rows)
        self._rows, self._pipes = rows, pipes
        self._size = 0

    def memory(self, size: int, device: str) -> Tensor:
        assert device == "cpu"
        self._size = size
        return self._rows[self.rank, :size].zero_()

    def sum(self, blocks: int) -> None:
        """Every rank sums a slice of all rows, in row 0, and takes the whole from there."""
        cut = -(-self._size // self.ranks)
        slices = self._rows[:blocks, : self._size][:, self.rank * cut : (self.rank + 1) * cut]
        self._meet()  # all rows are written
        tree_sum(list(slices))
        self._meet()  # row 0 is summed
        if self.rank:
            self._rows[self.rank, : self._size].copy_(self._rows[0, : self._size])
        self._meet()  # and read

    def gather(self, row: Tensor) -> Tensor:
        joined = self._meet(row.numpy().tobytes())
        return torch.frombuffer(bytearray(joined), dtype=torch.float64).view(self.ranks, -1)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()

    def _meet(self, message: bytes = b"-") -> bytes:
        """Waits for all ranks → their messages, joined in the ranks' order."""
        try:
            if self.rank:
                self._pipes[0].send_bytes(message)
                return self._answer(self._pipes[0])
            joined = b"".join([message, *(self._answer(pipe) for pipe in self._pipes)])
            for pipe in self._pipes:
                pipe.send_bytes(joined)
        except (EOFError, OSError) as error:
            raise OtherRankFailed from error
        return joined

    def _answer(self, pipe: connection.Connection) -> bytes:
        if not pipe.poll(ANSWER_SECONDS):
            raise OtherRankFailed(f"no answer for {ANSWER_SECONDS:g} s")
        return pipe.recv_bytes()


def connected(ranks: int, size: int) -> list[SharedMemory]:
    """The ends of all ranks. size: the most that any call of `memory` asks for."""
    rows = torch.zeros(ranks, size).share_memory_()
    pipes = [processes.get_context("spawn").Pipe() for _ in range(ranks - 1)]
    others = [SharedMemory(rank, rows, [far]) for rank, (_, far) in enumerate(pipes, 1)]
    return [SharedMemory(0, rows, [near for near, _ in pipes]), *others]


def fits(ranks: int, size: int) -> bool:
    """Whether this host's shared memory has room for the ranks' rows; containers often have 64 MB in all."""
    if not SHARED_MEMORY.is_dir():
        return True
    free = os.statvfs(SHARED_MEMORY)
    return ranks * size * torch.float32.itemsize < free.f_bavail * free.f_frsize
