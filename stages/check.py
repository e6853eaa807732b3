"""params.yaml, its recipes and the files that it names → every problem. Run by train, and by hand before a long run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.core.config import PARAMS_FILE
from pipeline.jobs import check

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.option("--params", type=PATH, default=PARAMS_FILE, show_default=True, help="Read: the file to check.")
@click.option(
    "--records", type=PATH, default="data/records.h5", show_default=True,
    help="Read, if it is there: records of prepare, for the number of training images.",
)  # fmt: skip
@click.option("--run", help="Look for the files of this run only (a key of `methods`); settings are checked of all.")
def main(params: Path, records: Path, run: str | None) -> None:
    """Checks params.yaml, every recipe that it names, and that data and weights are there; lists all problems.

    Errors give exit code 1. Warnings do not: they say which training is too short to learn anything, and
    which precision is slow on this machine.
    """
    problems = [*check.problems(params), *check.missing_files(params, run)]
    for warning in [*check.warnings(params, records), *check.slow_precisions(params)]:
        click.secho(f"Warning: {warning}", fg="yellow", err=True)
    if problems:
        raise click.ClickException("\n".join(problems))
    click.echo(f"{params} and its recipes are valid, and the files that they name are there")


if __name__ == "__main__":
    main()
