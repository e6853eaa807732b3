"""Score maps → a fitted refiner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import fit_refiner

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--scoremaps", type=PATH, required=True, help="Read: HDF5 store of extract.")
@click.option("--init", type=PATH, required=True, help="Read: initial weights of a learned refiner's backbone.")
@click.option("--refiner", type=PATH, required=True, help="Written: the refiner's state, safetensors.")
def main(run: str, records: Path, scoremaps: Path, init: Path, refiner: Path) -> None:
    """Fits the refiner of RUN on split train: its threshold, and its network if it has one. No mask is read.

    Reads section fit_refiner of the run's recipe. A run that was killed goes on where it was.
    """
    with runtime.stage():
        fit_refiner.run(Settings.read(run), records=records, scoremaps=scoremaps, init=init, refiner=refiner, engine=runtime)


if __name__ == "__main__":
    main()
