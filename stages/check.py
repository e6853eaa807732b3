"""params.yaml and its recipes → every problem in them. Run by train, `make doctor` and by hand."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.core.config import PARAMS_FILE
from pipeline.jobs import check


@click.command()
@click.option(
    "--params", type=click.Path(path_type=Path), default=PARAMS_FILE, show_default=True, help="Read: the file to check."
)
def main(params: Path) -> None:
    """Checks params.yaml and every recipe that it names, and lists all problems. The exit code is 1 if there are any."""
    problems = check.problems(params)
    if problems:
        raise click.ClickException("\n".join(problems))
    click.echo(f"{params} and its recipes are valid")


if __name__ == "__main__":
    main()
