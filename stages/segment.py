"""Records + trained segmenter → predictions on val."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import segment

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--segmenter", type=PATH, required=True, help="Read: the trained segmenter.")
@click.option("--predictions", type=PATH, required=True, help="Written: HDF5 store of labels and confidences.")
def main(run: str, records: Path, segmenter: Path, predictions: Path) -> None:
    """Segments split val with the segmenter of RUN; tags are not used.

    Reads section segment of the run's recipe, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        segment.run(Settings.read(run), records=records, segmenter=segmenter, predictions=predictions, engine=runtime)


if __name__ == "__main__":
    main()
