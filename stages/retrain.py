"""Pseudo-masks + initial weights → a trained segmenter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import train

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--pseudo-masks", type=PATH, required=True, help="Read: HDF5 store of export.")
@click.option("--init", type=PATH, required=True, help="Read: initial weights of the encoder.")
@click.option("--segmenter", type=PATH, required=True, help="Written: the trained segmenter, safetensors.")
@click.option("--log", type=PATH, required=True, help="Written: losses by step, CSV.")
def main(run: str, records: Path, pseudo_masks: Path, init: Path, segmenter: Path, log: Path) -> None:
    """Trains the segmenter of RUN on its pseudo-masks.

    Reads section retrain of the run's recipe, and the images under dataset.root. A run that was killed goes on where it was.
    """
    with runtime.stage():
        train.run(
            Settings.read(run), "segmenters", records=records, init=init, masks=pseudo_masks, model=segmenter, log=log,
            engine=runtime,
        )  # fmt: skip


if __name__ == "__main__":
    main()
