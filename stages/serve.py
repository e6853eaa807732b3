"""A trained segmenter → a machine learning backend for Label Studio. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import serve

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--images", type=PATH, help="Read: folder with the images of the tasks; default dataset.root of params.yaml.")
@click.option("--segmenter", type=PATH, help="Read: the trained segmenter; default artifacts/RUN/segmenter.safetensors.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=9090, show_default=True, help="0 takes a free one.")
@click.option("--allow-urls", multiple=True, metavar="SERVER", help="Images may be fetched from it: http://localhost:8080.")
def main(run: str, images: Path | None, segmenter: Path | None, host: str, port: int, allow_urls: tuple[str, ...]) -> None:
    """Predicts masks for the tasks of a Label Studio project, by the segmenter of RUN.

    In the project: Settings, Model, Connect Model, and the address that this command shows. The project's labelling
    interface needs BrushLabels of the classes; labels.xml of the export format label_studio has them.
    """
    weights = segmenter or Path("artifacts") / run / "segmenter.safetensors"
    with runtime.stage():
        settings = Settings.read(run)
        serve.run(settings, weights, images or settings.root, urls=allow_urls, host=host, port=port, engine=runtime)


if __name__ == "__main__":
    main()
