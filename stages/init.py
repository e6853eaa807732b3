"""Photographs and tags → a project folder of their own. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.jobs import init, project

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("folder", type=PATH)
@click.option("--images", type=PATH, help="Read: folder of the photographs. They stay where they are.")
@click.option(
    "--tags", type=PATH, help="Read: table with columns id and tags; it is copied. Default: tags.csv beside the images."
)
@click.option("--method", "methods", multiple=True, default=["apc"], show_default=True, help="May be given several times.")
@click.option("--renew", is_flag=True, help="Only writes dvc.yaml anew, as the installed tag2mask needs it.")
def main(folder: Path, images: Path | None, tags: Path | None, methods: tuple[str, ...], renew: bool) -> None:
    """Makes FOLDER a project: its own params.yaml, recipes and results, one installation of tag2mask for all.

    Photographs lie in one folder with any nesting. Tags come from tags.csv, or from one sub-folder per class. A folder with
    images/ in it may also hold tags.csv and masks/, which are used only to measure.
    """
    try:
        if renew:
            project.write_dag(folder)
            return
        if images is None:
            raise click.UsageError("Missing --images.")
        found = init.create(folder, images, tags, methods)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for line in found.lines():
        click.echo(line)
    forecasts = init.forecasts(folder, found)
    for forecast in forecasts:
        click.echo(forecast.text())
    for warning in [*found.warnings, *(warning for forecast in forecasts for warning in forecast.warnings)]:
        click.secho(f"warning: {warning}", fg="yellow")
    click.echo(f"{folder} is a project now; its params.yaml says which data and which methods")
    steps = [f"cd {folder}", *(f"tag2mask weights get {Path(path).stem}" for path in init.initial_weights(folder))]
    click.echo("next: " + "\n      ".join([*steps, "tag2mask run", "tag2mask report --open"]))


if __name__ == "__main__":
    main()
