"""Work on parts for tests of the engines, and what comes of it on a Ray cluster.

python -m tests.engine_case <folder> <process>    name → result or error of every case, into RESULTS of the folder, on the
                                                  cluster that RAY_ADDRESS names; `process` is a node's, which gets lost
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pipeline import runtime
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ChangedImageError
from pipeline.engine import ray_node

RESULTS = "results.json"


def killed_once(item: int, marker: Path) -> int:
    """The first process that comes to item 3 is killed."""
    if item == 3:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return item * item
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def killed(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def written(number: int) -> int:
    """Writes a part of masks, slowly."""

    def items() -> Iterator[store.Item]:
        for image in range(4):
            time.sleep(0.05)
            yield f"{number:05d}-{image}", {"mask": np.full((8, 8), image, np.uint8)}

    store.write_part(
        store.part_path(Path(), number), store.PSEUDO_MASKS, items(), labels=LabelSpace(("cat",)), part=number, parts=12,
        params_digest="", compression="gzip",
    )  # fmt: skip
    return number


def failing(item: int) -> int:
    if item == 4:
        raise ChangedImageError("photo.jpg has changed")
    return item


def place_of(item: int) -> dict[str, Any]:
    """Where an item was computed."""
    time.sleep(0.1)  # so that no worker can do all
    variables = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")}
    return {"folder": str(Path.cwd()), "process": os.getpid(), "node": os.getppid(), **variables}


def devices() -> list[str]:
    """That TAG2MASK_DEVICE gives, or the error."""
    given = []
    for asked in ("auto", "cpu", "cuda", "cuda:1"):
        with mock.patch.dict(os.environ, TAG2MASK_DEVICE=asked):
            try:
                given.append(runtime.device())
            except SystemExit as error:
                given.append(str(error))
    return given


def in_a_folder_that_nodes_do_not_see(folder: Path) -> list[int]:
    with mock.patch.object(Path, "cwd", lambda: folder / "gone"):
        return mapped(failing, 2)


def with_other_code() -> list[int]:
    """The stage's: that of a node cannot be changed for a case."""
    with mock.patch.object(ray_node, "code", lambda: {"pipeline": "another"}):
        return mapped(failing, 2)


def with_a_node_lost(folder: Path, process: int) -> list[int]:
    folder.mkdir()
    os.chdir(folder)
    results = runtime.map_parts(written, range(12), what="parts")
    first = next(results)
    os.kill(process, signal.SIGKILL)
    return [first, *results]


def mapped(function: Callable[[int], Any], items: int, device: str = "cpu") -> list[Any]:
    return list(runtime.map_parts(function, range(items), what="items", device=device))


def cases(folder: Path, process: int) -> dict[str, Callable[[], Any]]:
    return {
        "devices": devices,
        "places": partial(mapped, place_of, 12),
        "places on GPUs": partial(mapped, place_of, 12, "cuda"),
        "a worker killed once": partial(mapped, partial(killed_once, marker=folder / "killed"), 12),
        "a GPU's worker killed once": partial(mapped, partial(killed_once, marker=folder / "killed too"), 12, "cuda"),
        "every worker killed": partial(mapped, killed, 1),
        "an error": partial(mapped, failing, 8),
        "a folder that nodes do not see": partial(in_a_folder_that_nodes_do_not_see, folder),
        "other code": with_other_code,
        "a node lost": partial(with_a_node_lost, folder / "parts", process),
    }


def main(folder: Path, process: int) -> None:
    results: dict[str, Any] = {}
    for name, case in cases(folder, process).items():
        try:
            results[name] = case()
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    from tests import engine_case  # so that workers find the functions by the same name

    engine_case.main(Path(sys.argv[1]), int(sys.argv[2]))
