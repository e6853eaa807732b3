"""Any folder of images + a trained segmenter → masks and overlays. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import segment_folder

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--images", type=PATH, required=True, help="Read: any folder of images.")
@click.option("--out", type=PATH, required=True, help="Written: a folder of palette PNGs and overlays.")
@click.option("--segmenter", type=PATH, help="Read: the trained segmenter; default artifacts/RUN/segmenter.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replaces masks that are in --out already.")
def main(run: str, images: Path, out: Path, segmenter: Path | None, overwrite: bool) -> None:
    """Segments a folder of images with the segmenter of RUN.

    Images that cannot be read are listed at the end; the exit code is then 1. Reads section segment of the run's recipe.
    """
    weights = segmenter or Path("artifacts") / run / "segmenter.safetensors"
    with runtime.stage():
        result = segment_folder.run(Settings.read(run), weights, images, out, overwrite=overwrite, engine=runtime)
    for problem in result.problems:
        click.echo(problem, err=True)
    click.echo(
        f"{result.written} masks and overlays written to {out}; {len(result.problems)} images could not be read", err=True
    )
    if result.problems:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
