"""Ranks on one or several hosts: an Exchange over torch.distributed, gloo between CPUs and NCCL between GPUs.

Not DistributedDataParallel, nor all_reduce: they sum in an order that depends on the number of ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.processes import StopRequest
from pipeline.training import threads
from pipeline.training.exchange import OtherRankFailed, tree_sum
from pipeline.training.job import Job
from pipeline.training.run import Run


class ProcessGroup:
    """An end of torch.distributed's default group, which exists already.

    Every rank owns a slice of the values: it is sent that slice of all blocks, sums them along the tree, and sends the sums
    to all. With R ranks and n values a rank sends 2 n (R - 1) / R of them, as in a ring all-reduce.
    """

    def __init__(self) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._slices = self._received = torch.empty(0)

    def memory(self, size: int, device: str) -> Tensor:
        cut = -(-size // self.ranks)
        self._slices = torch.zeros(self.ranks, cut, device=device)
        self._received = torch.empty_like(self._slices)
        return self._slices.view(-1)[:size]

    def sum(self, blocks: int) -> None:
        with _failures_of_others():
            dist.all_to_all_single(self._received, self._slices)
        own = tree_sum(list(self._received[:blocks]))
        self._received[1:] = own  # all are sent the same slice; gloo's all_gather takes three times as long
        with _failures_of_others():
            dist.all_to_all_single(self._slices, self._received)

    def gather(self, row: Tensor) -> Tensor:
        rows = row.new_empty(self.ranks, len(row))
        with _failures_of_others():
            dist.all_gather(list(rows), row)
        return rows

    def close(self) -> None:
        pass  # whoever made the group ends it


@contextmanager
def _failures_of_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise OtherRankFailed from error


def store_at(port: int, ranks: int, *, serves: bool) -> Any:
    """Where ranks of this host meet. port: 0 takes a free one, if this process serves the store."""
    TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]
    return TCPStore("127.0.0.1", port, ranks, is_master=serves, wait_for_workers=False)


@contextmanager
def joined(store: Any, rank: int, ranks: int, device: str) -> Iterator[None]:
    """Makes the default group, and ends it."""
    if device != "cpu":
        torch.cuda.set_device(device)
    dist.init_process_group(backends(device), store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def abort() -> None:
    """Ends what other threads of this process wait for, as far as the backend can: NCCL can, gloo need not."""
    if (group := dist.group.WORLD) is not None:
        group.abort()


def backends(device: str) -> str:
    """Of the default group; objects that are no tensors go by gloo."""
    return "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"


def run(job: Job, device: str, stop: StopRequest) -> Iterator[str]:
    """One rank of the default group, from building the trainable to the end of the job: its notes. device: the rank's own.

    What starts ranks other than as processes beside this one (engine/) calls it in each of them. A request to stop in any
    rank ends all in order: Interrupted.
    """
    threads.single()
    if device != "cpu":
        torch.cuda.set_device(device)
    yield from Run(dataclasses.replace(job, device=device), job.build(), ProcessGroup(), stop).notes()
