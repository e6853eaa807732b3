"""Any folder of images + a trained segmenter, by torch or as ONNX → masks and overlays. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import segment_folder

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run", required=False)
@click.option("--images", type=PATH, required=True, help="Read: any folder of images.")
@click.option("--out", type=PATH, required=True, help="Written: a folder of palette PNGs and overlays.")
@click.option("--segmenter", type=PATH, help="Read: the trained segmenter; default artifacts/RUN/segmenter.safetensors.")
@click.option("--onnx", type=PATH, help="Read: a model of export-model, instead of RUN. Needs no project and no torch.")
@click.option("--overwrite", is_flag=True, help="Replaces masks that are in --out already.")
def main(run: str | None, images: Path, out: Path, segmenter: Path | None, onnx: Path | None, overwrite: bool) -> None:
    """Segments a folder of images with the trained segmenter of RUN, or with an ONNX model.

    Images that cannot be read are listed at the end; the exit code is then 1. Windows, scales and mirror images are those of
    section segment of the run's recipe; an ONNX model holds its own. A CRF of section segment is no part of an ONNX model.
    """
    if (run is None) == (onnx is None):
        raise click.UsageError("give either RUN or --onnx FILE")
    if onnx is not None and segmenter is not None:
        raise click.UsageError("--segmenter goes with RUN; --onnx is a whole model by itself")
    with runtime.stage():
        predictor: segment_folder.Predictor
        if onnx is not None:
            from pipeline.jobs.onnx_model import OnnxSegmenter  # without torch

            predictor = OnnxSegmenter.read(onnx)
            if predictor.metadata.segment.crf is not None:
                click.echo(
                    "section segment asks for a CRF, which is no part of an ONNX model: masks come without it", err=True
                )
        else:
            from pipeline.jobs.torch_predictor import TorchSegmenter

            assert run is not None  # asked above
            weights = segmenter or Path("artifacts") / run / "segmenter.safetensors"
            predictor = TorchSegmenter.of(Settings.read(run), weights, runtime.device())
        result = segment_folder.run(predictor, images, out, overwrite=overwrite, engine=runtime)
    for problem in result.problems:
        click.echo(problem, err=True)
    parts = [f"{result.written} masks and overlays written to {out}"]
    if result.kept:
        parts.append(f"{result.kept} masks were there already (use --overwrite)")
    click.echo("; ".join([*parts, f"{len(result.problems)} images could not be read"]), err=True)
    if result.problems:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
