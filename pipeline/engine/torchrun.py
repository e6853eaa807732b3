"""Ranks that torchrun has started, on one or several hosts: rank 0 is the stage, the others take part in its trainings.

    torchrun --nproc-per-node 8 -m stages.train apc --records … --init … --model … --log …

The others know nothing of the stage: rank 0 sends them each training as a function and a job.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from pipeline.core.processes import Interrupted, StopRequest, stop_on_signal

Run = Callable[[Any, str, StopRequest], Iterator[str]]  # (job, torch device of the rank, stop) → notes

BEGIN, END = "begin", "end"
POLL_SECONDS = 0.2


@cache
def is_in_use() -> bool:
    """Whether torchrun has started this process. What this process starts is no rank, and does not see the variable."""
    return os.environ.pop("TORCHELASTIC_RUN_ID", None) is not None


def ranks() -> int:
    """On all hosts together."""
    return int(os.environ["WORLD_SIZE"])


def check_gpus(count: int) -> None:
    """SystemExit where this host has more ranks than GPUs."""
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks_here > count:
        raise SystemExit(
            f"torchrun has started {ranks_here} ranks on this host; allowed is one per GPU: --nproc-per-node 1 to {count}"
        )


def is_first() -> bool:
    return os.environ["RANK"] == "0"


def launch(run: Run, job: Any) -> Iterator[str]:
    """In rank 0: has run(job, device, stop) called in all ranks → its own notes. A signal in any of them stops all."""
    import torch.distributed as dist

    _say(f"{BEGIN} {job.device}")
    _join(job.device)
    dist.broadcast_object_list([run, job], src=0)
    yield from _run(run, job)


def follow() -> None:
    """In every other rank: takes part in the trainings of rank 0, until it has no more."""
    import torch.distributed as dist

    while (message := _answer()) != END:
        _join(message.removeprefix(f"{BEGIN} "))
        received: list[Any] = [None, None]
        dist.broadcast_object_list(received, src=0)
        with suppress(Interrupted):  # rank 0 was, too, and has saved
            for _ in _run(*received):
                pass


def end() -> None:
    """In rank 0: no more training follows."""
    _say(END)


def _run(run: Run, job: Any) -> Iterator[str]:
    device = f"cuda:{os.environ['LOCAL_RANK']}" if job.device == "cuda" else job.device
    with stop_on_signal() as stop:
        yield from run(job, device, stop)


def _join(device: str) -> None:
    """Makes torch.distributed's default group, once in a process's life."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        store = distributed_c10d.PrefixStore("group", _store())
        dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=ranks())


@cache
def _store() -> Any:
    """torchrun's, through which ranks find each other."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]


_messages = 0  # sent by rank 0, or read by another rank


def _say(message: str) -> None:
    global _messages
    _store().set(f"message {_messages}", message)
    _messages += 1


def _answer() -> str:
    """The next message of rank 0, which may take hours; torchrun ends this process where rank 0 has failed."""
    global _messages
    key = f"message {_messages}"
    while not _store().check([key]):
        time.sleep(POLL_SECONDS)
    _messages += 1
    return _store().get(key).decode()
