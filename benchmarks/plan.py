"""`python -m benchmarks.plan`: what `plan` predicts for the demo's scenes, against the time that the stages take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import click
import yaml
from rich.console import Console
from rich.table import Table

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import plan, rates

PROJECT = Path(__file__).resolve().parents[1]


def project(folder: Path, run: str, images: int) -> None:
    """The demo with one run, on so many scenes, a fifth of them val; prepared."""
    folder.mkdir()
    for name in ("dvc.yaml", "recipes"):
        (folder / name).symlink_to(PROJECT / name)
    (folder / "data/corrections").mkdir(parents=True)
    (folder / "data/weights").symlink_to(PROJECT / "data/weights")
    params = yaml.safe_load((PROJECT / "presets/scenes.yaml").read_text(encoding="utf-8"))
    params["methods"] = {run: params["methods"][run]}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    val = images // 5
    draw = ["pipeline.datasets.scenes.dataset", "data/raw/scenes", f"--train={images - val}", f"--val={val}"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-m", *draw], cwd=folder, check=True, stdout=subprocess.DEVNULL, env=environment)
    seconds("prepare", folder)


def seconds(stage: str, folder: Path) -> float:
    """That a stage takes, as DVC runs it."""
    words, environment = runtime.stage_command(stage, folder, folder / "timeline")
    started = time.monotonic()
    subprocess.run(words, cwd=folder, env=environment, check=True, stderr=subprocess.DEVNULL)
    return time.monotonic() - started


def rows(folder: Path, run: str, images: int) -> Iterator[tuple[str, float, float]]:
    """(stage, predicted s, measured s)."""
    with chdir(folder):
        measured = rates.measure(run, records=Path("data/records.h5"), truth=Path("data/truth.h5"), stages=runtime)
        known = rates.Rates("here", runtime.device(), rates.sample_size(runtime), 0.8, {run: measured})
        val = images // 5
        predicted = plan.of_run(
            Settings.read(run), known, plan.Images(images - val, val), plan.Machine(runtime.workers(), 0)
        )
    for row in predicted[1:]:  # prepare's rate is taken from its last run
        yield row.stage, row.seconds, seconds(row.stage if row.stage == "report" else f"{row.stage}@{run}", folder)


@click.command()
@click.argument("counts", type=int, nargs=-1)
@click.option("--run", default="cam", show_default=True, help="A run of the demo.")
def main(counts: tuple[int, ...], run: str) -> None:
    """Compares on COUNTS images, 100 and 1000 unless given. The machine must do nothing else."""
    for images in counts or (100, 1000):
        table = Table(f"{run}, {images} images", "predicted, s", "measured, s", "ratio")
        folder = Path(tempfile.mkdtemp()) / "project"
        try:
            project(folder, run, images)
            total = [0.0, 0.0]
            for stage, predicted, measured in rows(folder, run, images):
                total = [total[0] + predicted, total[1] + measured]
                table.add_row(stage, f"{predicted:.1f}", f"{measured:.1f}", f"{predicted / measured:.2f}")
            table.add_row("all", f"{total[0]:.1f}", f"{total[1]:.1f}", f"{total[0] / total[1]:.2f}")
        finally:
            shutil.rmtree(folder.parent, ignore_errors=True)
        Console(width=100).print(table)


if __name__ == "__main__":
    main()
