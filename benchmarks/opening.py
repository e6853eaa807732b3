"""`python -m benchmarks.opening`: time and memory to open records and a store of a million images, as a stage does."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.core import records, store
from pipeline.core.ids import encode
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import RecordTable
from pipeline.core.records import Records
from pipeline.jobs.engine import parts_of

LABELS = LabelSpace(tuple(f"class {number}" for number in range(20)))
TAGS = 2  # of an image
WIDTH = 24  # characters of an id


def write(folder: Path, count: int, images_per_part: int) -> None:
    """records.h5, a tenth of it val, and a store of a mask of one pixel for each image of split train."""
    random = np.random.default_rng(0)
    ids = [f"{number:0{WIDTH}d}" for number in range(count)]
    columns = {
        "ids": encode(ids),
        "paths": encode([f"images/{image_id}.jpg" for image_id in ids]),
        "size": np.full((count, 2), 500, np.uint32),
        "split": (np.arange(count) % 10 == 0).astype(np.uint8),
        "tagged": np.ones(count, np.uint8),
        "sha256": random.integers(0, 256, (count, 32), dtype=np.uint8),
    }
    tags = np.tile(np.arange(TAGS, dtype=np.uint16), count)
    table = RecordTable(columns, tags, np.arange(count + 1) * TAGS)
    records.write(folder / "records.h5", Records(LABELS, table, ()))
    mask = {"mask": np.zeros((1, 1), np.uint8)}
    for part, part_ids in enumerate(parts := store.parts_of(table.of_split("train").ids, images_per_part)):
        store.write_part(
            store.part_path(folder, part), store.PSEUDO_MASKS, ((image_id, mask) for image_id in part_ids), labels=LABELS,
            part=part, parts=len(parts), params_digest="", compression="gzip",
        )  # fmt: skip


def peak() -> float:
    """Peak resident MiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def opened(folder: Path, images_per_part: int) -> list[tuple[str, float, float]]:
    """What a stage does before its first part: (step, seconds, growth of the peak in MiB since the imports) of each step."""
    rows, before = [], peak()

    def row(what: str, started: float) -> None:
        rows.append((what, time.perf_counter() - started, peak() - before))

    started = time.perf_counter()
    read = records.read(folder / "records.h5")
    row("records: read", started)
    started = time.perf_counter()
    train = read.split("train")
    parts = parts_of(train, images_per_part)
    row(f"records: split train, cut into {len(parts):,} parts", started)
    started = time.perf_counter()
    masks = store.Store(folder, store.PSEUDO_MASKS)
    masks.require(train.ids)
    row(f"store: opened, all ids of {len(masks.paths):,} parts required", started)
    started = time.perf_counter()
    train.among(masks.ids)
    row("records: those of the store, as retrain asks", started)
    return rows


@click.command()
@click.option("--images", default=1_000_000, show_default=True)
@click.option("--images-per-part", default=256, show_default=True)
def main(images: int, images_per_part: int) -> None:
    """Writes records and a store of IMAGES images, then opens them in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1, maxtasksperchild=1) as pool:  # a process each: a peak never falls, and a child begins with
            pool.apply(write, (Path(name), images, images_per_part))  # its parent's
            rows = pool.apply(opened, (Path(name), images_per_part))
    table = Table("step", "s", "peak since the imports, MiB", title=f"{images:,} images")
    for what, seconds, growth in rows:
        table.add_row(what, f"{seconds:.2f}", f"{growth:.0f}")
    table.add_row("all", f"{sum(seconds for _, seconds, _ in rows):.2f}", f"{rows[-1][2]:.0f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
