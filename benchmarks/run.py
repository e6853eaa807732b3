"""`python -m benchmarks.run [CASE …]`: speed, ratio to the reference in the same run, and peak memory of each case."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.timing import Memory, Timing


def measured(name: str) -> tuple[list[Timing] | list[Timing | Memory], float]:
    """A case's timings and the peak memory of its process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        timings = CASES[name](Path(folder))
    return timings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(list(CASES)))
def main(cases: tuple[str, ...]) -> None:
    """Measures CASES, or all. Ratios hold on a noisy machine; single times do not."""
    table = Table(title="1 process, 1 thread")
    for column in ("what", "ours", "reference", "times better", "peak MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    context = multiprocessing.get_context("spawn")
    for name in cases or CASES:
        with context.Pool(1) as pool:  # a process of its own: peak memory never falls
            timings, peak = pool.apply(measured, (name,))
        for one in timings:
            table.add_row(*one.cells(), f"{peak:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
