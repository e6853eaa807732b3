"""The images, tags and masks of a run → a FiftyOne data set. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import readers, runtime
from pipeline.core.sections import Settings

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--name", help="Of the data set in FiftyOne; default tag2mask-RUN.")
@click.option(
    "--records", type=PATH, default=Path("data/records.h5"), show_default=True, help="Read: records.h5 of prepare."
)
@click.option("--artifacts", type=PATH, help="Read: folder of the run's masks; default artifacts/RUN.")
@click.option("--audit", type=PATH, help="Read: score and reasons per image; default audit/RUN.csv, if it is there.")
@click.option("--out", type=PATH, help="Written: masks as PNGs, which FiftyOne reads; default fiftyone/RUN.")
@click.option("--overwrite", is_flag=True, help="Replaces a data set of that name.")
@click.option("--persistent/--temporary", default=True, show_default=True, help="Whether FiftyOne keeps it.")
def main(
    run: str, name: str | None, records: Path, artifacts: Path | None, audit: Path | None, out: Path | None,
    overwrite: bool, persistent: bool,
) -> None:  # fmt: skip
    """Shows RUN in FiftyOne: photographs with tags, pseudo-masks, predictions, quality score and reasons.

    Then `fiftyone app launch` opens them. Needs pip install 'tag2mask[fiftyone]'.
    """
    folder, table = artifacts or Path("artifacts") / run, audit or Path("audit") / f"{run}.csv"
    predictions = folder / "predictions"
    with runtime.stage():
        dataset = readers.to_fiftyone(
            name or f"tag2mask-{run}",
            records_file=records,
            masks_folder=folder / "pseudo_masks",
            root=Settings.read(run).root,
            out=out or Path("fiftyone") / run,
            predictions_folder=predictions if predictions.is_dir() else None,
            audit_file=table if audit is not None or table.is_file() else None,
            overwrite=overwrite,
            persistent=persistent,
        )
        click.echo(f"{len(dataset)} images in FiftyOne's data set {dataset.name}")


if __name__ == "__main__":
    main()
