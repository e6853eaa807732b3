"""Raw images and tags → records and truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core import sections
from pipeline.jobs import prepare

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.option("--raw", type=PATH, required=True, help="Read: the data set's folder, dataset.root.")
@click.option("--records", type=PATH, required=True, help="Written: ids, sizes, splits, tags, hashes.")
@click.option("--truth", type=PATH, required=True, help="Written: masks, where there are any.")
def main(raw: Path, records: Path, truth: Path) -> None:
    """Opens every image and mask once, and lists all problems of the data set. Later stages rely on what it writes.

    Reads sections dataset and prepare of params.yaml.
    """
    with runtime.stage():
        prepare.run(sections.read(), raw, records=records, truth=truth, engine=runtime)


if __name__ == "__main__":
    main()
