"""Metrics, curves and galleries of all runs → report/index.html and review.csv; or the changes since a git revision."""

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
@click.option("--metrics", type=FOLDER, help="Read: folder of <run>.json.")
@click.option("--plots", type=FOLDER, help="Read: folder of <run>/threshold.csv.")
@click.option("--gallery", type=FOLDER, help="Read: folder of <run>.h5.")
@click.option("--inspection", type=FOLDER, help="Read: folder of <run>.h5.")
@click.option("--audit", type=FOLDER, help="Read: folder of <run>.csv, a row per image and stage.")
@click.option("--report", type=FOLDER, help="Written: folder with index.html and review.csv.")
@click.option(
    "--against", metavar="REV", help="Writes against.html beside the report instead: changes since a git revision."
)
def main(against: str | None, **options: Path | None) -> None:
    """Writes a page on all runs: metrics per stage, plots, and a gallery of images. No network is needed.

    Reads sections methods and report of params.yaml. With --against, paths that are not given are those of dvc.yaml.
    """
    paths = {name: path for name, path in options.items() if path is not None}
    with runtime.stage():
        if against is not None:
            click.echo(job.write_comparison(sections.read(), against, runtime.command_paths("report", Path()) | paths))
        elif missing := [f"--{name}" for name in options if name not in paths]:
            raise click.UsageError(f"Missing {', '.join(missing)}.")
        else:
            job.run(sections.read(), paths)


if __name__ == "__main__":
    main()
