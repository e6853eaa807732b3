"""Refined labels + corrected masks → pseudo-masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import export

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--refined", type=PATH, required=True, help="Read: HDF5 store of refine.")
@click.option("--corrections", type=PATH, required=True, help="Read: folder of corrected masks.")
@click.option("--pseudo-masks", type=PATH, required=True, help="Written: the product, an HDF5 store.")
@click.option("--exports", type=PATH, required=True, help="Written: the pseudo-masks in other formats.")
def main(run: str, records: Path, refined: Path, corrections: Path, pseudo_masks: Path, exports: Path) -> None:
    """Turns the refined labels of RUN into pseudo-masks: 255 where confidence is low or two thresholds disagree.

    Reads section export of params.yaml. Classes beyond an image's tags come from corrected masks alone.
    """
    with runtime.stage():
        export.run(
            Settings.read(run),
            records=records,
            refined=refined,
            corrections=corrections,
            pseudo_masks=pseudo_masks,
            exports=exports,
            engine=runtime,
        )


if __name__ == "__main__":
    main()
