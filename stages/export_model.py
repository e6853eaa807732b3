"""A run's trained segmenter → ONNX, checked against torch. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import export_model

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--onnx", type=PATH, required=True, help="Written: the model, FILE.onnx.")
@click.option("--int8", is_flag=True, help="Written, too: FILE.int8.onnx, smaller and mostly faster, less exact.")
@click.option("--check-images", type=PATH, help="Read: photographs to check on; default those of --records.")
@click.option("--segmenter", type=PATH, help="Read: the trained segmenter; default artifacts/RUN/segmenter.safetensors.")
@click.option(
    "--records", type=PATH, default=Path("data/records.h5"), show_default=True, help="Read: records.h5 of prepare."
)
def main(run: str, onnx: Path, int8: bool, check_images: Path | None, segmenter: Path | None, records: Path) -> None:
    """Writes the trained segmenter of RUN as ONNX, for images of any size.

    The file holds normalisation, class names, colours and section segment of the recipe. Ten photographs are segmented by
    torch and by onnxruntime; at least 99.9 % of their pixels must be equal, else no file is written and the exit code is 1.
    Needs `pip install 'tag2mask[onnx]'`.
    """
    weights = segmenter or Path("artifacts") / run / "segmenter.safetensors"
    with runtime.stage():
        written = export_model.run(
            Settings.read(run), weights, onnx, int8=int8, images=check_images, records=records, engine=runtime
        )
    for model in written:
        click.echo(str(model))


if __name__ == "__main__":
    main()
