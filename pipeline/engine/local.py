"""Parts of work → results in their order, by processes of this host."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import TypeVar

from pipeline.core.processes import begin_child, deaf_children
from pipeline.engine.threads import one_thread

In = TypeVar("In")
Out = TypeVar("Out")


def map_parts(function: Callable[[In], Out], parts: Sequence[In], processes: int) -> Iterator[Out]:
    """function(part) for every part, at most two parts per process in flight."""
    context = multiprocessing.get_context("spawn")  # fork after torch has threads is unsafe
    pool = ProcessPoolExecutor(min(processes, len(parts)), context, _begin_worker)
    try:
        with deaf_children():
            first = pool.submit(function, parts[0])  # starts all processes
        running: dict[Future[Out], int] = {first: 0}
        done: dict[int, Out] = {}
        source, next_out = iter(enumerate(parts[1:], 1)), 0
        exhausted = False
        while not exhausted or running:
            while not exhausted and len(running) + len(done) < 2 * processes + 2:
                try:
                    index, part = next(source)
                except StopIteration:
                    exhausted = True
                    break
                running[pool.submit(function, part)] = index
            finished, _ = wait(running, return_when=FIRST_COMPLETED) if running else (set(), None)
            for future in finished:
                done[running.pop(future)] = future.result()
            while next_out in done:
                yield done.pop(next_out)
                next_out += 1
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    begin_child()
    one_thread()
