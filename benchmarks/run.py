"""`python -m benchmarks.run [CASE …]`: speed, ratio to the reference in the same run, and peak memory of each case."""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, Timing


def measured(name: str) -> tuple[list[Timing], float]:
    """A case's timings and the peak memory of its process in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        timings = CASES[name](Path(folder))
    return timings, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@click.command()
@click.argument("cases", nargs=-1, type=click.Choice(list(CASES)))
def main(cases: tuple[str, ...]) -> None:
    """Measures CASES, or all. Ratios hold on a noisy machine; single times do not."""
    table = Table(title="1 process, 1 thread")
    for column in ("what", "ours", "reference", "times faster", "peak MiB"):
        table.add_column(column, justify="left" if column == "what" else "right")
    context = multiprocessing.get_context("spawn")
    for name in cases or CASES:
        with context.Pool(1) as pool:  # a process of its own: peak memory never falls
            timings, peak = pool.apply(measured, (name,))
        for one in timings:
            reference = (
                "–" if one.reference is None else f"{one.amount / one.reference:.1f} {one.unit}/s ({one.reference_name})"
            )
            ratio = "–" if one.reference is None else f"{one.reference / one.seconds:.2f}"
            table.add_row(one.what, f"{one.amount / one.seconds:.1f} {one.unit}/s", reference, ratio, f"{peak:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
