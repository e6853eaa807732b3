"""Work as it goes on → a bar on a terminal, or lines in a log. Only runtime.py imports it; it is a dep of no stage."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

Out = TypeVar("Out")
Advance = Callable[[int, str], None]  # by so many, with a note

log = logging.getLogger("tag2mask")


def warn(text: str, *values: object) -> None:
    """Logs a line that must not be missed: red on a terminal."""
    if sys.stderr.isatty():
        from rich.console import Console

        Console(stderr=True, soft_wrap=True).print(text % values, style="bold red", markup=False, highlight=False)
    else:
        log.warning("warning: " + text, *values)


def progress(
    items: Iterable[Out],
    total: int,
    what: str,
    unit: int = 1,
    *,
    done: int = 0,
    counts: Sequence[int] | None = None,
    noun: str = "images",
    timeline: Path | None = None,
) -> Iterator[Out]:
    """Yields items, with a progress bar on a terminal, else with a log line per tenth of total.

    unit, counts: how many of `total` an item is, all the same or one by one; done: where an earlier run has stopped;
    noun: what is counted. An item that is a text is shown as a note. timeline: a file to which `_timed` appends.
    """
    sizes = itertools.repeat(unit) if counts is None else iter(counts)
    show = _bar if sys.stderr.isatty() else _lines
    record = nullcontext(_ignore) if timeline is None else _timed(timeline, what, noun)
    with record as add, show(total, what, done, noun) as advance:
        for item in items:
            yield item
            count, note = next(sizes), item if isinstance(item, str) else ""
            add(count, note)
            advance(count, note)


def _ignore(count: int, note: str) -> None:
    """Of a run without a timeline."""


@contextmanager
def _timed(path: Path, what: str, noun: str) -> Iterator[Advance]:
    """Appends a line of JSON at the start and as each item is done: what, noun, count, note, s of the monotonic clock."""
    with path.open("a", encoding="utf-8", buffering=1) as file:

        def add(count: int, note: str) -> None:
            line = {"what": what, "noun": noun, "count": count, "note": note, "seconds": time.monotonic()}
            file.write(json.dumps(line) + "\n")

        add(0, "")
        yield add


@contextmanager
def _bar(total: int, what: str, done: int, noun: str) -> Iterator[Advance]:
    """A bar that leaves a single line when it is full: one stage after another does not fill the screen."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.{1 if speed < 100 else 0}f} {noun}/s")

    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), Rate(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False),
    )  # fmt: skip
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(count: int, note: str) -> None:
            bar.update(task, advance=count, note=note)

        yield advance
    seconds = time.monotonic() - started
    log.info("%s %d/%d %s %.0f s (%.1f %s/s)", what, total, total, noun, seconds, (total - done) / max(seconds, 1e-3), noun)


@contextmanager
def _lines(total: int, what: str, done: int, noun: str) -> Iterator[Advance]:
    started, count, logged_tenth = time.monotonic(), done, done * 10 // max(1, total)

    def advance(more: int, note: str) -> None:
        nonlocal count, logged_tenth
        count += more
        tenth = count * 10 // max(1, total)
        if tenth > logged_tenth:
            logged_tenth = tenth
            seconds = time.monotonic() - started
            log.info("%s %d/%d %.0f s%s", what, count, total, seconds, f" {note}" if note else "")

    yield advance
