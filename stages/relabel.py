"""Records + trained segmenter → its masks of the train images, among their tags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import relabel

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--segmenter", type=PATH, required=True, help="Read: the trained segmenter.")
@click.option("--relabelled", type=PATH, required=True, help="Written: HDF5 store of probabilities, labels and confidences.")
def main(run: str, records: Path, segmenter: Path, relabelled: Path) -> None:
    """Segments split train with the segmenter of RUN; only classes that an image is tagged with can win.

    Reads sections segment and relabel of the run's recipe, and the images under dataset.root. Finished parts survive a
    crash.
    """
    with runtime.stage():
        relabel.run(Settings.read(run), records=records, segmenter=segmenter, relabelled=relabelled, engine=runtime)


if __name__ == "__main__":
    main()
