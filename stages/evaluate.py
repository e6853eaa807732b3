"""All results of a run + truth → figures, plots, indicators per image and stage, thumbnails for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import evaluate

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--truth", type=PATH, required=True, help="Read: masks of prepare; no earlier stage opens them.")
@click.option("--scoremaps", type=PATH, required=True, help="Read: HDF5 store of extract.")
@click.option("--refiner", type=PATH, required=True, help="Read: state of fit_refiner, for its threshold.")
@click.option("--refined", type=PATH, required=True, help="Read: HDF5 store of refine.")
@click.option("--pseudo-masks", type=PATH, required=True, help="Read: HDF5 store of export.")
@click.option("--predictions", type=PATH, required=True, help="Read: HDF5 store of segment.")
@click.option("--held-out", type=PATH, required=True, help="Read: indicators of cross_validate, HDF5.")
@click.option("--relabelled", type=PATH, required=True, help="Read: HDF5 store of relabel.")
@click.option("--metrics", type=PATH, required=True, help="Written: a dozen figures for `dvc metrics`, JSON.")
@click.option("--figures", type=PATH, required=True, help="Written: all figures, JSON.")
@click.option(
    "--images", type=PATH, required=True, help="Written: quality indicators, score and reasons per image and stage, CSV."
)
@click.option("--small-masks", type=PATH, required=True, help="Written: every image's last mask, downsampled, HDF5.")
@click.option("--gallery", type=PATH, required=True, help="Written: thumbnails of the worst and of random images, HDF5.")
@click.option("--thresholds", type=PATH, required=True, help="Written: mIoU over the threshold, CSV for dvc plots.")
@click.option("--per-class", type=PATH, required=True, help="Written: IoU per class, CSV for dvc plots.")
@click.option("--confusion", type=PATH, required=True, help="Written: percent of each true class, CSV for dvc plots.")
def main(
    run: str, records: Path, truth: Path, scoremaps: Path, refiner: Path, refined: Path, pseudo_masks: Path,
    predictions: Path, held_out: Path, relabelled: Path, metrics: Path, figures: Path, images: Path, small_masks: Path,
    gallery: Path, thresholds: Path, per_class: Path, confusion: Path,
) -> None:  # fmt: skip
    """Scores every stage of RUN on the images that have truth, and computes the quality indicators, which need none.

    Reads section evaluate of params.yaml, and the images under dataset.root for edges and thumbnails.
    """
    with runtime.stage():
        outs = evaluate.Outs(metrics, figures, images, small_masks, gallery, thresholds, per_class, confusion)
        evaluate.run(
            Settings.read(run), records=records, truth=truth, scoremaps=scoremaps, refiner=refiner, refined=refined,
            pseudo_masks=pseudo_masks, predictions=predictions, held_out=held_out, relabelled=relabelled, outs=outs,
            engine=runtime,
        )  # fmt: skip


if __name__ == "__main__":
    main()
