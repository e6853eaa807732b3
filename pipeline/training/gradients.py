"""The gradients and running statistics of a step as one flat tensor, in which shards and ranks are summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from pipeline.training.exchange import BlockSum, block_count, block_size, tree_sum
from pipeline.training.rank import Rank, float_buffers


class Gradients:
    """Of one phase. `grad` of each parameter is a view of the exchange's memory: backward writes where sums are made.

    Behind the gradients lie the float buffers (running statistics), whose mean over shards is taken: every shard starts from
    the values before the step. Nothing here waits for the device.
    """

    def __init__(self, rank: Rank, parameters: Sequence[nn.Parameter], shards: int) -> None:
        self._exchange, self._shards = rank.exchange, shards
        self._buffers, self._statistics = list(rank.trainable.buffers()), float_buffers(rank.trainable)
        borders = [0, *accumulate(tensor.numel() for tensor in (*parameters, *self._statistics))]
        memory = self._exchange.memory(borders[-1], rank.device)
        self._sum = BlockSum(memory)
        views = [memory[start:end] for start, end in pairwise(borders)]
        for parameter in rank.trainable.parameters():
            parameter.grad = None
        for parameter, view in zip(parameters, views, strict=False):
            parameter.grad = view.view(parameter.shape)
        self._gradients, self._means = memory.split([borders[len(parameters)], borders[-1] - borders[len(parameters)]])
        self._views = views[len(parameters) :]  # of the means
        self._before: list[Tensor] = []  # buffers, as the step finds them

    def begin_step(self) -> None:
        self._before = [buffer.clone() for buffer in self._buffers]

    @contextmanager
    def shard(self) -> Iterator[None]:
        """Within it, a forward and a backward pass; a parameter without a gradient has 0."""
        for buffer, value in zip(self._buffers, self._before, strict=True):
            buffer.copy_(value)
        self._sum.begin()
        yield
        if self._statistics:
            torch.cat([buffer.flatten() for buffer in self._statistics], out=self._means)
        self._sum.end()

    def end_step(self) -> Tensor:
        """Sums shards and ranks → bool[] on the device, whether all gradients are finite."""
        self._sum.finish()
        self._exchange.sum(block_count(self._shards, block_size(self._shards, self._exchange.ranks)))
        self._set_statistics()
        return torch.isfinite(self._gradients.sum())

    def divide(self, scale: float) -> None:
        self._gradients.div_(scale)

    def _set_statistics(self) -> None:
        """Sets the float buffers to their mean. What no shard has changed keeps its bytes, which the mean of more than two
        equal numbers need not have: it is known by its sum, that of so many values as before."""
        if not self._statistics:
            return
        before = torch.cat([value.flatten() for value in self._before if value.is_floating_point()]).float()
        unchanged = self._means == tree_sum([before.clone() for _ in range(self._shards)])
        self._means.copy_(torch.where(unchanged, before, self._means / self._shards))
        for buffer, view in zip(self._statistics, self._views, strict=True):
            buffer.copy_(view.view(buffer.shape))
