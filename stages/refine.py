"""Score maps + fitted refiner → refined labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import refine

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--scoremaps", type=PATH, required=True, help="Read: HDF5 store of extract.")
@click.option("--refiner", type=PATH, required=True, help="Read: state of fit_refiner.")
@click.option("--refined", type=PATH, required=True, help="Written: HDF5 store of labels and confidences.")
def main(run: str, records: Path, scoremaps: Path, refiner: Path, refined: Path) -> None:
    """Refines the score maps of RUN on split train into a label and a confidence per pixel.

    Reads section refine of the run's recipe, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        refine.run(
            Settings.read(run), records=records, scoremaps=scoremaps, refiner=refiner, refined=refined, engine=runtime
        )


if __name__ == "__main__":
    main()
