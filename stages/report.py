"""Figures, curves and galleries of the runs → report/index.html and review.csv; or the changes since a git revision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core import sections
from pipeline.jobs import report as job

FOLDER: Any = click.Path(path_type=Path)


@click.command()
@click.option("--records", type=FOLDER, help="Read: records.h5 of prepare.")
@click.option("--metrics", type=FOLDER, help="Read: folder of <run>.json, of the work tree and of git's history.")
@click.option("--plots", type=FOLDER, help="Read: folder of <run>/threshold.csv.")
@click.option("--gallery", type=FOLDER, help="Read: folder of <run>.h5.")
@click.option("--inspection", type=FOLDER, help="Read: folder of <run>.h5.")
@click.option("--audit", type=FOLDER, help="Read: folder of <run>.json, all figures, and <run>.csv, a row per image.")
@click.option("--report", type=FOLDER, help="Written: folder with index.html and review.csv.")
@click.option(
    "--against", metavar="REV", help="Writes against.html beside the report instead: changes since a git revision."
)
@click.option("--open", "show", is_flag=True, help="Opens the page in the browser.")
def main(against: str | None, show: bool, **options: Path | None) -> None:
    """Writes a page on all runs that are there: figures per stage, plots, tables and a gallery. No network is needed.

    Runs that are missing or out of date are named on the page. Paths that are not given are those of dvc.yaml. Reads
    sections methods and report of params.yaml.
    """
    with runtime.stage():
        paths = runtime.command_paths("report", Path()) | {name: path for name, path in options.items() if path is not None}
        values = sections.read()
        if against is not None:
            page, differences = job.write_comparison(values, against, paths)
            for run, difference in differences.items():
                click.echo(f"{run}: not comparable with {against}: {difference}", err=True)
        else:
            page = job.run(values, paths, job.outdated_runs(values) if runtime.stage_name() is None else ())
        address = page.resolve().as_uri()
        click.echo(f"report: {address}")
        if show:
            click.launch(address)


if __name__ == "__main__":
    main()
