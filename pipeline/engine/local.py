"""Parts of work → results in their order, by processes of this host; on CUDA by one per GPU, which sees that GPU alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from pipeline.core.processes import begin_child, pool_of
from pipeline.engine.devices import see_only
from pipeline.engine.threads import one_thread

In = TypeVar("In")
Out = TypeVar("Out")

LOSSES = 3  # times in a row that workers may be killed before a part is done


def map_parts(
    function: Callable[[In], Out], parts: Sequence[In], processes: int, devices: Sequence[str] = ()
) -> Iterator[Out]:
    """function(part) for every part, at most two parts per process in flight. Where a process is killed, new ones compute
    what is not done.

    devices: without any, CPU alone computes; else one per process, as CUDA_VISIBLE_DEVICES names it.

    RuntimeError where they are killed LOSSES times and no part is done in between.
    """
    done: dict[int, Out] = {}
    returned = losses = 0
    while returned < len(parts):
        missing = [number for number in range(returned, len(parts)) if number not in done]
        try:
            for number, result in _finished(function, parts, missing, processes, devices):
                done[number], losses = result, 0
                while returned in done:
                    yield done.pop(returned)
                    returned += 1
        except BrokenProcessPool as error:
            losses += 1
            if losses == LOSSES:
                raise RuntimeError(
                    f"worker processes were killed {LOSSES} times in a row: memory may have run out (fewer need less: "
                    "TAG2MASK_WORKERS, TAG2MASK_LOADERS); what is finished is kept, run again to go on"
                ) from error


def _finished(
    function: Callable[[In], Out], parts: Sequence[In], missing: Sequence[int], processes: int, devices: Sequence[str]
) -> Iterator[tuple[int, Out]]:
    """(number, result) of the missing parts as they are done, never further ahead of the first that is not done than the
    parts in flight. BrokenProcessPool where a process is killed."""
    free = multiprocessing.get_context("spawn").SimpleQueue()  # of this pool; after a kill another one follows
    for name in devices:
        free.put(name)
    with pool_of(min(processes, len(missing)), _begin_worker, (free if devices else None,)) as pool:
        running: dict[Future[Out], int] = {}
        at = 0
        while at < len(missing) or running:
            first = min(running.values(), default=missing[at] if at < len(missing) else 0)
            while at < len(missing) and missing[at] - first < 2 * processes + 2:
                running[pool.submit(function, parts[missing[at]])] = missing[at]
                at += 1
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()


def _begin_worker(free: Any) -> None:
    """free: queue of the devices that no worker has taken; None on CPU."""
    begin_child()
    one_thread()
    if free is not None:
        see_only(free.get())
