"""Signals and child processes: the parent alone decides when work ends, and what to save before it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any, cast

ENDING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what `kill`, schedulers and containers send
POLL_SECONDS = 0.01


class Interrupted(KeyboardInterrupt):
    """Work that a signal ended in order; the text says how far it is."""


class StopRequest:
    """Whether a signal asked for an end since `stop_on_signal` began."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. A second signal does not wait: KeyboardInterrupt."""
        if self.made:
            raise KeyboardInterrupt
        self.made = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within it, SIGINT and SIGTERM are only noted, so that the work can end where it is whole."""
    request = StopRequest()
    with _handled(request):
        yield request


@contextmanager
def interrupted_by_signal() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt, as SIGINT does."""
    with _handled(signal.default_int_handler):
        yield


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started within it are deaf to SIGINT and SIGTERM from their first moment on, as a terminal sends
    signals to all of them; `begin_child` keeps it so. A signal to this process waits until the end of the context."""
    waiting: list[int] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # which they inherit; of this thread alone
    try:
        with _handled(lambda number, _: waiting.append(number)):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in waiting:
            signal.raise_signal(number)


def begin_child() -> None:
    """The first call of a child process: it ignores SIGINT and SIGTERM, and ends when its parent has ended, however."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


class _Worker(SpawnProcess):
    """Where one was killed, the executor ends the others by SIGTERM, to which they are deaf."""

    def start(self) -> None:
        with deaf_children():
            super().start()

    def terminate(self) -> None:
        self.kill()


class _Context(SpawnContext):
    """Of a pool; fork after torch has threads is unsafe."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []

    def Process(self, *arguments: Any, **named: Any) -> _Worker:
        self.workers.append(_Worker(*arguments, **named))
        return self.workers[-1]


@contextmanager
def pool_of(
    processes: int, begin: Callable[..., None] = begin_child, arguments: tuple[Any, ...] = ()
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, started one by one as calls come, each of which begins with begin(*arguments).

    At the end of the context it waits for the calls that run, and drops the others. Where a process is killed, all end: its
    calls and all later ones raise BrokenProcessPool.
    """
    context = _Context()
    pool = ProcessPoolExecutor(processes, context, begin, arguments)
    try:
        yield pool
    finally:
        threading.Thread(target=_end_where_one_was_killed, args=(context.workers,), daemon=True).start()
        pool.shutdown(cancel_futures=True)


def _end_where_one_was_killed(workers: Sequence[_Worker]) -> None:
    """Of a pool that is to end: the others may wait for a lock that the killed one had, and the pool for them."""
    waiting = {worker.sentinel: worker for worker in workers}
    while waiting:
        for sentinel in connection.wait(list(waiting)):
            ended = waiting.pop(cast(int, sentinel))
            while ended.exitcode is None:  # the executor's thread is about to see it
                time.sleep(POLL_SECONDS)
            if ended.exitcode:
                for other in waiting.values():
                    other.kill()


@contextmanager
def _handled(handler: signal._HANDLER) -> Iterator[None]:
    """Handles ENDING so; does nothing outside of the main thread, where Python allows no change."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ENDING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
