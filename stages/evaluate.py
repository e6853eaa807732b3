"""All results of one column + truth → metrics, plots, a row per image and stage, small pictures for the report."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, sections, store
from pipeline.core import records as records_file
from pipeline.steps import evaluate
from pipeline.steps import gallery as pictures

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("method")
@click.option("--records", type=FILE, required=True, help="Read: records.h5 of prepare.")
@click.option("--truth", type=FILE, required=True, help="Read: masks of prepare; no earlier stage opens them.")
@click.option("--scoremaps", type=FILE, required=True, help="Read: HDF5 store of extract.")
@click.option("--refiner", type=FILE, required=True, help="Read: state of fit_refiner, for its background level.")
@click.option("--refined", type=FILE, required=True, help="Read: HDF5 store of refine.")
@click.option("--pseudo-masks", type=FILE, required=True, help="Read: HDF5 store of export.")
@click.option("--predictions", type=FILE, required=True, help="Read: HDF5 store of segment.")
@click.option("--held-out", type=FILE, required=True, help="Read: figures of cross_validate, HDF5.")
@click.option("--metrics", type=FILE, required=True, help="Written: figures per stage, JSON.")
@click.option("--thresholds", type=FILE, required=True, help="Written: mIoU over the background level, CSV for dvc plots.")
@click.option("--per-class", type=FILE, required=True, help="Written: IoU per class, CSV for dvc plots.")
@click.option("--confusion", type=FILE, required=True, help="Written: percent of each true class, CSV for dvc plots.")
@click.option("--images", type=FILE, required=True, help="Written: signs, score and reasons per image and stage, CSV.")
@click.option("--small-masks", type=FILE, required=True, help="Written: every image's last mask in small, HDF5.")
@click.option("--gallery", type=FILE, required=True, help="Written: small pictures of the worst and of random images, HDF5.")
def main(
    method: str, records: Path, truth: Path, scoremaps: Path, refiner: Path, refined: Path, pseudo_masks: Path, predictions: Path,
    held_out: Path, metrics: Path, thresholds: Path, per_class: Path, confusion: Path, images: Path, small_masks: Path, gallery: Path,
) -> None:  # fmt: skip
    """Scores every stage of METHOD's column, on the images that have truth; without any, gives the figures that need none.

    Reads section evaluate of params.yaml, and the images under dataset.root for their edges and the pictures.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Evaluate, values["evaluate"], "evaluate")
        read = records_file.read(records)
        inputs = evaluate.Inputs(
            truth=truth,
            scoremaps=scoremaps,
            refined=refined,
            pseudo_masks=pseudo_masks,
            predictions=predictions,
            held_out=held_out,
            level=evaluate.chosen_level(refiner),
            settings=settings,
            labels=read.labels,
            root=Path(sections.dataset(values).root),
        )
        chunks = [read.images[at : at + evaluate.PER_ITEM] for at in range(0, len(read), evaluate.PER_ITEM)]
        tally = evaluate.Tally.empty(len(read.labels) + 1, settings.threshold_bins)
        function = partial(evaluate.tally_some, inputs=inputs)
        counted = runtime.each(function, chunks, processes=runtime.workers(), what=f"evaluate {method}")
        store.write_part(
            small_masks, store.SMALL_MASKS, evaluate.gathered(counted, tally), labels=read.labels, part=0, parts=1,
            params_digest="", compression="gzip",
        )  # fmt: skip
        audit = evaluate.audited(tally)
        found = evaluate.summary(audit, inputs, read)
        evaluate.write_tables(
            audit, found, read, thresholds=thresholds, per_class=per_class, confusion=confusion, images=images
        )
        chosen = pictures.shown(audit, read, settings.gallery)
        groups = [chosen[at : at + pictures.PER_ITEM] for at in range(0, len(chosen), pictures.PER_ITEM)]
        draw = partial(pictures.draw_some, inputs=inputs)
        drawn = runtime.each(draw, groups, processes=runtime.workers(), what=f"pictures {method}")
        store.write_part(
            gallery, store.GALLERY, chain.from_iterable(drawn), labels=read.labels, part=0, parts=1, params_digest="",
            compression="none",
        )  # fmt: skip
        metrics.parent.mkdir(parents=True, exist_ok=True)
        metrics.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
