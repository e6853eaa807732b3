"""A training by processes of this host: rank 0 is this process, the others are started beside it.

CPUs sum through shared memory, GPUs through NCCL; so do CPUs through gloo where the host's shared memory is too small.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch.multiprocessing as multiprocessing

from pipeline.core import processes
from pipeline.core.processes import Interrupted, StopRequest
from pipeline.training import process_group, shared_memory, threads
from pipeline.training.exchange import OtherRankFailed, Single, block_count, block_size
from pipeline.training.job import Job
from pipeline.training.process_group import ProcessGroup
from pipeline.training.rank import float_buffers
from pipeline.training.run import Run
from pipeline.training.shared_memory import SharedMemory

START_SECONDS = 0.05
END_SECONDS = 30.0


def run(job: Job, trainable: Any) -> Iterator[str]:
    """Runs a job with at most job.ranks processes, no more than have a block of shards to compute → rank 0's notes.

    trainable: as job.build makes it. What another rank raised, this one raises.
    """
    ranks = max(block_count(phase.shards, block_size(phase.shards, job.ranks)) for phase in trainable.phases())
    size = _largest_exchange(trainable)
    with processes.stop_on_signal() as stop:
        if ranks == 1:
            yield from Run(job, trainable, Single(), stop).notes()
        elif job.device == "cpu" and shared_memory.fits(ranks, size):
            yield from _by_shared_memory(job, trainable, ranks, size, stop)
        else:
            yield from _by_process_group(job, trainable, ranks, stop)


def _largest_exchange(trainable: Any) -> int:
    """Values that a rank puts into the exchange in a step, at most."""
    trained = [
        sum(parameter.numel() for group in trainable.param_groups(phase) for parameter in group.parameters)
        for phase in trainable.phases()
    ]
    return max(trained) + sum(buffer.numel() for buffer in float_buffers(trainable))


def _by_shared_memory(job: Job, trainable: Any, ranks: int, size: int, stop: StopRequest) -> Iterator[str]:
    own, *others = shared_memory.connected(ranks, size)
    with _beside(_rank_of_shared_memory, [(job, other) for other in others]):
        for other in others:
            other.close()  # this process's copies, so that a rank that ends closes its last one
        try:
            yield from Run(job, trainable, own, stop).notes()
        finally:
            own.close()


def _rank_of_shared_memory(job: Job, exchange: SharedMemory) -> None:
    for _ in Run(job, job.build(), exchange, StopRequest()).notes():
        pass


def _by_process_group(job: Job, trainable: Any, ranks: int, stop: StopRequest) -> Iterator[str]:
    jobs = [dataclasses.replace(job, device=f"cuda:{rank}" if job.device == "cuda" else job.device) for rank in range(ranks)]
    store = process_group.store_at(0, ranks, serves=True)
    with _beside(_rank_of_process_group, [(jobs[rank], store.port, rank, ranks) for rank in range(1, ranks)]) as others:
        while not store.check([str(rank) for rank in range(1, ranks)]):  # a group would wait for a dead one
            if any(other.exitcode for other in others):
                raise OtherRankFailed
            time.sleep(START_SECONDS)
        threading.Thread(target=_abort_where_one_fails, args=(others,), daemon=True).start()
        with process_group.joined(store, 0, ranks, jobs[0].device):
            yield from Run(jobs[0], trainable, ProcessGroup(), stop).notes()


def _rank_of_process_group(job: Job, port: int, rank: int, ranks: int) -> None:
    store = process_group.store_at(port, ranks, serves=False)
    store.set(str(rank), "started")
    with process_group.joined(store, rank, ranks, job.device):
        for _ in Run(job, job.build(), ProcessGroup(), StopRequest()).notes():
            pass


def _abort_where_one_fails(others: Sequence[BaseProcess]) -> None:
    """NCCL does not notice that a process was killed: the group is aborted, lest this process waits until NCCL's timeout."""
    waiting = {other.sentinel: other for other in others}
    while waiting:
        ready = connection.wait(list(waiting))
        ended = [waiting.pop(sentinel) for sentinel in list(waiting) if sentinel in ready]
        if any(other.exitcode for other in ended):
            process_group.abort()
            return


@contextmanager
def _beside(target: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Sequence[BaseProcess]]:
    """Processes that call target(*arguments), until the end of the context. RuntimeError of what made one of them fail."""
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    others = [context.Process(target=_begin, args=(target, given, failures), daemon=True) for given in arguments]
    with processes.deaf_children():
        for other in others:
            other.start()
    try:
        yield others
    except OtherRankFailed as error:
        _end(others)
        raise _failure_of(error, others, failures) from None
    finally:
        _end(others)


def _end(others: Sequence[BaseProcess]) -> None:
    """Waits for processes that have nothing left to do; one that hangs is killed, since it ignores other signals."""
    deadline = time.monotonic() + END_SECONDS
    for other in others:
        other.join(timeout=max(0.0, deadline - time.monotonic()))
        if other.is_alive():
            other.kill()
            other.join()


def _failure_of(error: OtherRankFailed, others: Sequence[BaseProcess], failures: Any) -> RuntimeError:
    """What the failed rank says of it, with its traceback as a note; where it could say nothing, how it ended."""
    if failures.empty():
        killed = [f"rank {rank} was killed by signal {-other.exitcode}" for rank, other in enumerate(others, 1)
                  if other.exitcode is not None and other.exitcode < 0]  # fmt: skip
        return OtherRankFailed(killed[0]) if killed else error
    text, origin = failures.get()
    failure = RuntimeError(text)
    failure.add_note(origin)
    return failure


def _begin(target: Callable[..., None], arguments: tuple[Any, ...], failures: Any) -> None:
    """The whole life of a process beside rank 0, which says what is wrong: no traceback comes from here."""
    processes.begin_child()
    threads.single()
    try:
        with suppress(Interrupted):  # rank 0 was, too
            target(*arguments)
    except OtherRankFailed:
        sys.exit(1)  # rank 0 knows, or has failed itself
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
        failures.put((f"{kind}{error}", traceback.format_exc()))
        sys.exit(1)
