"""Where a job's work runs, as a job sees it (runtime.py decides), and how a store is written part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from pipeline.core import store
from pipeline.core.record_table import ImageRecord, Parts, RecordTable

In = TypeVar("In")
Out = TypeVar("Out")
Part = Sequence[ImageRecord]


class Engine(Protocol):
    """Nothing that it answers changes a result. `pipeline.runtime` fills it."""

    def device(self) -> str:
        """Torch device name."""
        ...

    def ranks(self, shards: int) -> int:
        """Processes that share the shards of a training step."""
        ...

    def launch(self) -> Any:
        """How ranks of a training are started, as loop.train takes it; None: as processes of this host."""
        ...

    def loaders(self, device: str) -> int:
        """Threads that decode images ahead of what computes on `device`; 0: none."""
        ...

    def beside(self, device: str) -> int:
        """Processes for CPU work beside one that computes on `device`; 0: none."""
        ...

    def map_parts(
        self,
        function: Callable[[In], Out],
        parts: Sequence[In],
        *,
        what: str,
        device: str = "cpu",
        images: Callable[[In], int] | None = None,
        done: int = 0,
    ) -> Iterator[Out]:
        """function(part) for every part, results in the order of `parts`.

        device  where the function computes
        images  how many a part has; without it, a part is an image
        done    images of an earlier run that this one goes on from
        """
        ...

    def progress(self, items: Iterable[Out], total: int, what: str, *, done: int = 0, noun: str = "images") -> Iterator[Out]:
        """Passes items through and shows how many of `total` there were, from `done` on; noun: what they are."""
        ...

    def code_digest(self) -> str:
        """sha256 of the project's code imported so far."""
        ...

    def info(self, text: str, *values: object) -> None:
        """Logs a line."""
        ...

    def warn(self, text: str, *values: object) -> None:
        """Logs a line that must not be missed."""
        ...


def parts_of(records: Iterable[ImageRecord], images_per_part: int) -> Parts:
    """Records in the order of their ids, cut as the parts of a store are; no records give one empty part."""
    return Parts(RecordTable.of(records), images_per_part)


class Missing(Sequence[tuple[int, Part]]):
    """(number, part) of some numbers; made as it is asked for, since a million images are thousands of parts."""

    def __init__(self, parts: Sequence[Part], numbers: Sequence[int]) -> None:
        self._parts, self._numbers = parts, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> tuple[int, Part]: ...
    @overload
    def __getitem__(self, index: slice) -> Missing: ...
    def __getitem__(self, index: int | slice) -> tuple[int, Part] | Missing:
        if isinstance(index, slice):
            return Missing(self._parts, self._numbers[index])
        return self._numbers[index], self._parts[self._numbers[index]]


def run_parts(
    function: Callable[..., Any],
    parts: Sequence[Part],
    job: Any,
    *,
    out: Path,
    engine: Engine,
    what: str,
) -> None:
    """function((number, part), job) for each part that folder `out` does not hold yet: a killed run goes on where it was.

    The function writes its part; it and `job`, a frozen dataclass, are picklable. A job that has a `device` computes there.
    """
    missing = Missing(parts, store.missing_parts(out, parts))
    done = sum(map(len, parts)) - sum(len(part) for _, part in missing)
    results = engine.map_parts(
        partial(function, job=job), missing, what=what, device=getattr(job, "device", "cpu"),
        images=lambda part: len(part[1]), done=done,
    )  # fmt: skip
    for _ in results:
        pass
