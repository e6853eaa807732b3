"""Parts of work → results in their order, by processes of this host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from pipeline.core.processes import begin_child, deaf_children
from pipeline.engine.threads import one_thread

In = TypeVar("In")
Out = TypeVar("Out")

LOSSES = 3  # times in a row that workers may be killed before a part is done


def map_parts(function: Callable[[In], Out], parts: Sequence[In], processes: int) -> Iterator[Out]:
    """function(part) for every part, at most two parts per process in flight. Where a process is killed, new ones compute
    what is not done.

    RuntimeError where they are killed LOSSES times and no part is done in between.
    """
    done: dict[int, Out] = {}
    returned = losses = 0
    while returned < len(parts):
        missing = [number for number in range(returned, len(parts)) if number not in done]
        try:
            for number, result in _finished(function, parts, missing, processes):
                done[number], losses = result, 0
                while returned in done:
                    yield done.pop(returned)
                    returned += 1
        except BrokenProcessPool as error:
            losses += 1
            if losses == LOSSES:
                raise RuntimeError(
                    f"worker processes were killed {LOSSES} times in a row: memory may have run out (fewer need less: "
                    "TAG2MASK_WORKERS); what is finished is kept, run again to go on"
                ) from error


def _finished(
    function: Callable[[In], Out], parts: Sequence[In], missing: Sequence[int], processes: int
) -> Iterator[tuple[int, Out]]:
    """(number, result) of the missing parts as they are done, never further ahead of the first that is not done than the
    parts in flight. BrokenProcessPool where a process is killed."""
    context = multiprocessing.get_context("spawn")  # fork after torch has threads is unsafe
    pool = ProcessPoolExecutor(min(processes, len(missing)), context, _begin_worker)
    try:
        running: dict[Future[Out], int] = {}
        at = 0
        while at < len(missing) or running:
            first = min(running.values(), default=missing[at] if at < len(missing) else 0)
            while at < len(missing) and missing[at] - first < 2 * processes + 2:
                with deaf_children():  # the first call starts all processes
                    running[pool.submit(function, parts[missing[at]])] = missing[at]
                at += 1
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    begin_child()
    one_thread()
