"""The installed tag2mask → code.yaml of a project folder, on which all stages there depend. In a clone, no stage."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.jobs import project


@click.command()
@click.option("--code", type=click.Path(path_type=Path), required=True, help="Written: digests of the installed code.")
def main(code: Path) -> None:
    """Writes the digests of the installed code, by which DVC re-runs the stages that an update of tag2mask changes."""
    try:
        project.write_code(code)
    except project.ProjectError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
