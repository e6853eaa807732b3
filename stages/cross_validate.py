"""Pseudo-masks + initial weights → per image, its agreement with a segmenter that was trained without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import cross_validate

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--pseudo-masks", type=PATH, required=True, help="Read: HDF5 store of export.")
@click.option("--init", type=PATH, required=True, help="Read: initial weights of the encoder.")
@click.option("--held-out", type=PATH, required=True, help="Written: two indicators per image, HDF5.")
def main(run: str, records: Path, pseudo_masks: Path, init: Path, held_out: Path) -> None:
    """Trains the segmenter of RUN once per fold without the fold's images, and compares its predictions of them with their
    masks.

    Reads sections cross_validate, retrain and segment of the run's recipe, and the images under dataset.root. With folds 0
    it writes a store of no images. Finished folds, parts and training steps survive a crash.
    """
    with runtime.stage():
        cross_validate.run(
            Settings.read(run), records=records, pseudo_masks=pseudo_masks, init=init, held_out=held_out, engine=runtime
        )


if __name__ == "__main__":
    main()
