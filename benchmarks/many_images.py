"""`python -m benchmarks.many_images`: what opening the records and a store of a million images takes.

Counted are the seconds and the growth of resident memory of a process that has imported what it needs.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import Parts, RecordTable

LABELS = LabelSpace(tuple(f"class {number}" for number in range(20)))
PER_PART = 256


def draw(folder: Path, count: int) -> None:
    """records.h5, and a store of pseudo-masks of a pixel."""
    ids = np.array([f"photographs/{number:09d}" for number in range(count)], "S21")
    columns = {
        "ids": ids, "paths": np.char.add(ids, b".jpg"), "size": np.full((count, 2), 500, np.uint32),
        "split": (np.arange(count) % 10 == 9).astype(np.uint8), "tagged": np.ones(count, np.uint8),
        "sha256": np.frombuffer(hashlib.shake_256(b"").digest(32 * count), np.uint8).reshape(-1, 32),
    }  # fmt: skip
    table = RecordTable(columns, (np.arange(2 * count) % 20).astype(np.uint16), np.arange(0, 2 * count + 1, 2))
    records.write(folder / "records.h5", records.Records(LABELS, table, ()))
    mask = {"mask": np.zeros((1, 1), np.uint8)}
    empty = store.empty(store.PSEUDO_MASKS) | mask
    (folder / "masks").mkdir()
    parts = Parts(table, PER_PART)
    for number, part in enumerate(parts):

        def items(part: RecordTable = part) -> Iterator[store.Item]:
            for image_id in part.ids:
                yield image_id, empty

        store.write_part(
            store.part_path(folder / "masks", number), store.PSEUDO_MASKS, items(), labels=LABELS, part=number,
            parts=len(parts), params_digest="", compression="none",
        )  # fmt: skip


def memory(name: str) -> float:
    """MiB of a row of /proc; getrusage would count what this process was before it started its program, too."""
    rows = dict(line.split(":") for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return int(rows[name].split()[0]) / 1024


def opened(folder: Path) -> dict[str, tuple[float, float]]:
    """What was done → (seconds, MiB of growth of the peak so far)."""
    figures: dict[str, tuple[float, float]] = {}
    first = memory("VmRSS")
    started = time.monotonic()

    def done(name: str) -> None:
        nonlocal started
        figures[name] = time.monotonic() - started, memory("VmHWM") - first
        started = time.monotonic()

    listed = records.read(folder / "records.h5")
    done("records: read")
    train = listed.split("train")
    parts = Parts(train, 32)
    assert sum(map(len, parts)) == len(train)
    done("records: split train, cut into parts of 32")
    masks = store.Store(folder / "masks", store.PSEUDO_MASKS)
    assert masks.read(listed.table[len(listed) // 2].id, "mask").shape == (1, 1)
    done("store: open, read a mask")
    masks.require(listed.ids)
    done("store: compare its ids with the records'")
    assert len(train.among(masks.ids)) == len(train)
    done("records: choose those that have a mask")
    assert records.sample(train, 100)
    done("records: sample 100")
    return figures


@click.command()
@click.option("--images", default=1_000_000, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path, exists=True), hidden=True)
def main(images: int, folder: Path | None) -> None:
    """Makes records and a store of so many images, and opens them in a process of its own."""
    if folder is not None:
        sys.stdout.write(json.dumps(opened(folder)))
        return
    with tempfile.TemporaryDirectory() as name:
        draw(Path(name), images)
        command = [sys.executable, "-m", "benchmarks.many_images", "--folder", name]
        figures = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    table = Table(f"{images:,} images", "seconds", "peak so far, MiB")
    for what, (seconds, peak) in figures.items():
        table.add_row(what, f"{seconds:.2f}", f"{peak:.0f}")
    table.add_row("all", f"{sum(seconds for seconds, _ in figures.values()):.2f}", "")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
