"""What ranks (processes) put in for the shards of a step → its sum over shards, in every rank.

Shards are summed along a fixed binary tree, ((0 + 1) + (2 + 3)) + …. A rank computes a block of consecutive shards that is
a whole subtree, and sums it first (`BlockSum`); then the blocks' sums are summed along the rest of the tree (`tree_sum`). So
the bytes depend neither on the number of ranks nor on what connects them: shared memory (`shared_memory.py`) or
torch.distributed (`process_group.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class OtherRankFailed(RuntimeError):
    """The exchange has ended because another rank failed, was killed, or gave no answer."""

    def __init__(self, reason: str = "it ended, or was killed") -> None:
        super().__init__(
            f"another process of this training failed ({reason}); what is saved is kept: run again to go on from the last "
            "checkpoint"
        )


class Exchange(Protocol):
    """One rank's way to the others. All ranks call the same methods in the same order; OtherRankFailed if one does not."""

    rank: int
    ranks: int

    def memory(self, size: int, device: str) -> Tensor:
        """f32[size] on the device, where the rank puts the sum of its block; ends the use of an earlier call's."""
        ...

    def sum(self, blocks: int) -> None:
        """Replaces the memory's content, in every rank, by the sum along the tree over the first `blocks` ranks."""
        ...

    def gather(self, row: Tensor) -> Tensor:
        """f64[k] → f64[ranks,k], the rows of all ranks, on the row's device."""
        ...

    def close(self) -> None:
        """No more calls: a rank that still waits for this one is told by OtherRankFailed."""
        ...


class Single:
    """The Exchange of one rank alone, on any device."""

    rank, ranks = 0, 1

    def memory(self, size: int, device: str) -> Tensor:
        return torch.zeros(size, device=device)

    def sum(self, blocks: int) -> None:
        del blocks

    def gather(self, row: Tensor) -> Tensor:
        return row[None]

    def close(self) -> None:
        pass


def block_size(shards: int, ranks: int) -> int:
    """Shards of a block: the least power of two with which the ranks can hold all. 4 shards and 3 ranks: 2, for 2 ranks."""
    size = 1
    while block_count(shards, size) > ranks:
        size *= 2
    return size


def block_count(shards: int, size: int) -> int:
    """Blocks of `size` shards, the last of which may be smaller."""
    return -(-shards // size)


def block(shards: int, rank: int, ranks: int) -> range:
    """The shards that a rank computes; none where there are more ranks than blocks."""
    size = block_size(shards, ranks)
    return range(min(shards, rank * size), min(shards, (rank + 1) * size))


def tree_sum(rows: Sequence[Tensor]) -> Tensor:
    """Rows of one shape → their sum along the tree, which is made in place: rows[0]."""
    distance = 1
    while distance < len(rows):
        for at in range(0, len(rows) - distance, 2 * distance):
            rows[at].add_(rows[at + distance])
        distance *= 2
    return rows[0]


class BlockSum:
    """The sum along the tree over a block's shards, which come one after another.

    memory: holds one shard's values between `begin` and `end`, and the sum after `finish`. Beside it there is a copy per
    level of the tree, none for a single shard.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self._copies: list[Tensor] = []  # kept from step to step
        self._waiting = 0  # copies that hold sums of subtrees
        self._shards = 0

    def begin(self) -> None:
        """Before a shard: sets the memory to 0, and what it held aside."""
        if self._shards:
            if self._waiting == len(self._copies):
                self._copies.append(torch.empty_like(self.memory))
            self._copies[self._waiting].copy_(self.memory)
            self._waiting += 1
        self.memory.zero_()

    def end(self) -> None:
        """After a shard: adds the subtrees that it completes."""
        self._shards += 1
        completed = self._shards
        while completed % 2 == 0:
            self._add_last()
            completed //= 2

    def finish(self) -> None:
        """After the last shard: adds the subtrees that have no partner of their size."""
        while self._waiting:
            self._add_last()
        self._shards = 0

    def _add_last(self) -> None:
        self._waiting -= 1
        self.memory.add_(self._copies[self._waiting])
