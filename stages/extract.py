"""Records + trained method → score maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import extract

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--model", type=PATH, required=True, help="Read: the trained method.")
@click.option("--scoremaps", type=PATH, required=True, help="Written: HDF5 store of score maps.")
@click.option("--inspection", type=PATH, required=True, help="Written: images of inner maps for the report, HDF5.")
def main(run: str, records: Path, model: Path, scoremaps: Path, inspection: Path) -> None:
    """Writes the score maps of RUN: on train for the classes of the tags, on val for those that the network predicts.

    Reads section extract of the run's recipe, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        extract.run(
            Settings.read(run), records=records, model=model, scoremaps=scoremaps, inspection=inspection, engine=runtime
        )


if __name__ == "__main__":
    main()
