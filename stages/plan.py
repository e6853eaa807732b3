"""Hours, bytes and memory of a run on so many images. No stage of the DAG."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline import runtime
from pipeline.core import records as records_file
from pipeline.core import sections
from pipeline.jobs import plan, rates

PATH: Any = click.Path(path_type=Path)


def _speeds(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    """STAGE=IMAGES_PER_SECOND → by stage."""
    try:
        return {stage: float(number) for stage, number in (value.split("=") for value in values)}
    except ValueError:
        raise click.BadParameter("allowed is STAGE=IMAGES, as train=250") from None


@click.command()
@click.argument("runs", nargs=-1)
@click.option("--images", type=click.FloatRange(min=1), required=True, help="Number of images, as 1e6.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, help="GPUs that networks compute on.")
@click.option("--workers", type=click.IntRange(min=1), help="CPU cores, all told; this machine's unless given.")
@click.option(
    "--speed", "speeds", metavar="STAGE=IMAGES", multiple=True, callback=_speeds,
    help="Images per second of one GPU in a stage (train, extract, …), where rates were measured on a CPU.",
)  # fmt: skip
@click.option("--rates", "path", type=PATH, default=rates.FILE, show_default=True, help="Read, or written if it is missing.")
@click.option("--measure", is_flag=True, help="Measures again.")
@click.option("--records", type=PATH, default="data/records.h5", show_default=True, help="Read: records of prepare.")
@click.option("--truth", type=PATH, default="data/truth.h5", show_default=True, help="Read: masks of prepare.")
def main(
    runs: tuple[str, ...],
    images: float,
    gpus: int,
    workers: int | None,
    speeds: dict[str, float],
    path: Path,
    measure: bool,
    records: Path,
    truth: Path,
) -> None:
    """Predicts seconds, bytes and peak memory of every stage of RUNS (all runs of params.yaml unless given).

    What a part and a step cost is measured on a sample of the project's own images, some minutes for a run, and kept in
    rates.yaml. Needs records of prepare.
    """
    with runtime.stage():
        names = list(runs) or sections.runs(sections.read())
        known = _rates(names, path, measure, records, truth)
        lacking = plan.unknown_on_gpus(known, speeds, names) if gpus else []
        if lacking:
            options = " ".join(f"--speed {stage}=IMAGES" for stage in lacking)
            raise ValueError(
                f"{path} was measured on a CPU, which says nothing of a GPU in {', '.join(lacking)}; measure on a machine "
                f"that has one, or give images per second of one: {options}"
            )
        known = plan.with_speed(known, speeds)
        train = round(images * known.train)
        machine = plan.Machine(workers or runtime.workers(), gpus)
        for name in names:
            rows = plan.of_run(sections.Settings.read(name), known, plan.Images(train, round(images) - train), machine)
            _show(name, rows, machine)
            for line in plan.few_shards(known, name, gpus):
                runtime.warn("%s: %s", name, line)


def _rates(names: list[str], path: Path, measure: bool, records: Path, truth: Path) -> rates.Rates:
    """What the file holds; runs that it lacks are measured and added."""
    known = rates.read(path) if path.is_file() and not measure else None
    missing = [name for name in names if known is None or name not in known.runs]
    if not missing:
        assert known is not None
        return known
    for file in (records, truth):
        if not file.is_file():
            raise ValueError(f"{file} is missing; run `dvc repro prepare` (or `tag2mask run prepare`) first")
    listed = records_file.read(records)
    if known is None:
        train = len(listed.split("train")) / max(1, len(listed))
        known = rates.Rates(platform.node(), runtime.device(), rates.sample_size(runtime), round(train, 4), {})
    for name in missing:
        measured = rates.measure(name, records=records, truth=truth, stages=runtime)
        known = replace(known, runs={**known.runs, name: measured})
        rates.write(path, known)  # run by run: an interrupted measurement keeps what it has
    return known


def _show(name: str, rows: list[plan.Row], machine: plan.Machine) -> None:
    gpus = f", {machine.gpus} GPU{'s' * (machine.gpus != 1)}" if machine.gpus else ""
    table = Table(f"{name} on {machine.workers} cores{gpus}", "time", "on disk", "peak memory", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(row.stage, _time(row.seconds), _size(row.bytes), _size(row.memory_mib * 2**20))
    seconds, size = sum(row.seconds for row in rows), sum(row.bytes for row in rows)
    table.add_row("all", _time(seconds), _size(size), _size(max(row.memory_mib for row in rows) * 2**20), style="bold")
    Console(highlight=False).print(table)


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(size: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
