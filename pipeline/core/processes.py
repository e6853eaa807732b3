"""Signals and child processes: the parent alone decides when work ends, and what to save before it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and what `kill`, schedulers and containers send


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
    """Processes that are started within it ignore SIGINT and SIGTERM from their first moment on, as a terminal sends
    signals to all of them; `begin_child` keeps it so."""
    with _handled(signal.SIG_IGN):
        yield


def begin_child() -> None:
    """The first call of a child process: it ignores SIGINT and SIGTERM, and ends when its parent has ended, however."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


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
