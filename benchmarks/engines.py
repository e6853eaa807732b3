"""`python -m benchmarks.engines PROJECT RUN`: the stages after training under Ray, against processes of this host.

Ray's own start is not counted: its cluster runs before, and what a stage takes to reach it is measured by itself.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline import runtime

STAGES = ("extract", "fit_refiner", "refine", "export", "segment", "relabel", "evaluate")
PORT = 6380
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex()}  # nobody else runs code on this host
CONNECT = "from pipeline import runtime\nlist(runtime.map_parts(str, range({workers}), what='parts'))"


def results(_: str, names: list[str]) -> set[str]:
    """What the measured stages write; they read cross_validate's."""
    return {name for name in names if name.endswith(".h5") and name != "held_out.h5"}


def copied(project: Path, folder: Path) -> None:
    """The project without its results of the stages that are measured; images and weights stay where they are."""
    for path in project.iterdir():
        if path.name in (".dvc", ".git", ".work", "report"):
            continue
        if path.name == "data":
            (folder / "data").mkdir()
            for inner in path.iterdir():
                (folder / "data" / inner.name).symlink_to(inner.resolve())
        elif path.is_dir() and path.name != "recipes":
            shutil.copytree(path, folder / path.name, ignore=results)
        elif path.is_dir():
            (folder / path.name).symlink_to(path.resolve())
        else:
            shutil.copy(path, folder / path.name)


def seconds(words: list[str], folder: Path, environment: dict[str, str]) -> float:
    started = time.monotonic()
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise click.ClickException(result.stderr[-2000:])
    return time.monotonic() - started


@click.command()
@click.argument("project", type=click.Path(path_type=Path, exists=True))
@click.argument("run")
@click.option("--workers", default=2, show_default=True)
def main(project: Path, run: str, workers: int) -> None:
    """Runs the stages after train of RUN, in a copy of PROJECT, whose segmenter is trained. The machine must be quiet."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={PORT}"]
    cluster = subprocess.Popen(
        [*command, f"--num-cpus={workers}", "--include-dashboard=false", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**runtime.with_own_commands(), **TOKEN},
    )  # fmt: skip
    given = {
        "local": {"TAG2MASK_WORKERS": str(workers)},
        "ray": {"TAG2MASK_ENGINE": "ray", "RAY_ADDRESS": f"127.0.0.1:{PORT}", **TOKEN},
    }
    taken: dict[str, list[float]] = {name: [] for name in given}
    try:
        for engine, variables in given.items():
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                copied(project, folder)
                environment = {**runtime.stage_command("prepare", folder, folder / "timeline")[1], **variables}
                environment.pop("DVC_STAGE")
                start = seconds([sys.executable, "-c", CONNECT.format(workers=workers)], folder, environment)
                taken[engine].append(start)
                for stage in STAGES:
                    words, environment = runtime.stage_command(f"{stage}@{run}", folder, folder / "timeline")
                    taken[engine].append(seconds(words, folder, environment | variables))
    finally:
        cluster.terminate()
        cluster.wait()
    table = Table("stage", "local, s", "ray, s", "ratio")
    for stage, local, other in zip(("a start of workers", *STAGES), taken["local"], taken["ray"], strict=True):
        table.add_row(stage, f"{local:.1f}", f"{other:.1f}", f"{other / local:.2f}")
    started = len(STAGES) * (taken["ray"][0] - taken["local"][0])
    local, other = sum(taken["local"][1:]), sum(taken["ray"][1:])
    table.add_row("stages", f"{local:.1f}", f"{other:.1f}", f"{other / local:.2f}")
    table.add_row("without Ray's starts", f"{local:.1f}", f"{other - started:.1f}", f"{(other - started) / local:.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
