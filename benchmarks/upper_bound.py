"""`python -m benchmarks.upper_bound RUN`: the fully supervised upper bound of a run → metrics/upper_bound/<run>.json for the
report.

The same segmenter, initial weights, settings and number of steps as in stage retrain, on the true masks of the train images
that have one. It is run by hand, in a project whose run is finished, and is no stage: no mask of split train may come near a
result. The report shows, where the file is there, how much of the upper bound a run's segmenter reaches. Run it again after
a change of retrain, segment or the data.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np

from benchmarks.ablation import RECIPE, link_code, write
from pipeline import metrics, metrics_file
from pipeline.core import records, store
from pipeline.core.config import ParamsError
from pipeline.core.sections import Settings

DIGITS = 5


def true_masks(read: records.Records, truth: store.Store, out: Path) -> records.Records:
    """Writes a store as export would, of the truth of split train; the records of its images and of split val."""
    labelled = [record for record in read.split("train") if record.id in truth]
    if not labelled:
        raise ParamsError("split train has no masks, so there is no upper bound to measure (data/truth.h5)")

    def items() -> Iterator[store.Item]:
        for record in sorted(labelled, key=lambda record: record.id):
            yield record.id, {"mask": truth.read(record.id, "mask")}

    store.write_part(
        store.part_path(out, 0), store.PSEUDO_MASKS, items(), labels=read.labels, part=0, parts=1, params_digest="",
        compression="gzip"
    )  # fmt: skip
    kept = {record.id for record in labelled} | {record.id for record in read.split("val")}
    return records.Records(read.labels, tuple(record for record in read if record.id in kept), ())


def as_many_steps(settings: Settings, read: records.Records, kept: records.Records) -> Settings:
    """Settings for a run elsewhere whose epochs make up for the images that have no mask."""
    params, recipe = copy.deepcopy(dict(settings.params)), copy.deepcopy(dict(settings.recipe))
    params["dataset"]["root"] = str(settings.root.resolve())
    params["methods"] = {settings.name: params["methods"][settings.name] | {"recipe": RECIPE}}
    recipe["retrain"]["schedule"]["epochs"] *= len(read.split("train")) / len(kept.split("train"))
    return dataclasses.replace(settings, params=params, recipe=recipe)


def miou_on_val(read: records.Records, truth: store.Store, predictions: Path) -> float:
    """mIoU with background of split val's images that have masks, 255 in the truth excluded, as evaluate has it."""
    predicted, classes = store.Store(predictions, store.PREDICTIONS), len(read.labels) + 1
    counts = np.zeros((classes, classes + 1), np.int64)
    for record in read.split("val"):
        if record.id in truth:
            counts += metrics.confusion(truth.read(record.id, "mask"), predicted.read(record.id, "label"), classes)
    return float(metrics.miou(counts, protocol="background"))


def run_stage(folder: Path, stage: str, *words: object) -> None:
    """In `folder`, with its progress shown."""
    subprocess.run([sys.executable, "-m", f"stages.{stage}", *map(str, words)], cwd=folder, check=True)


@click.command()
@click.argument("run")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(".work/upper_bound"), help="Folder for what is made on the way."
)
def main(run: str, work: Path) -> None:
    """Trains RUN's segmenter on the true masks of split train, and scores it on split val."""
    settings = Settings.read(run)
    read, truth = records.read(Path("data/records.h5")), store.Store(Path("data/truth.h5"), store.TRUTH)
    own = metrics_file.read(Path("audit") / f"{run}.json")
    folder = (work / run).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = true_masks(read, truth, folder / "masks")
    records.write(folder / "records.h5", kept)
    write(as_many_steps(settings, read, kept), folder)
    link_code(folder)
    init = Path(settings.run.segmenter_init)
    init = init.resolve() if init.exists() else init
    words = (run, "--records", "records.h5", "--segmenter", "segmenter.safetensors")
    run_stage(folder, "retrain", *words, "--pseudo-masks", "masks", "--init", init, "--log", "log.csv")
    run_stage(folder, "segment", *words, "--predictions", "predictions")
    full, weak = miou_on_val(kept, truth, folder / "predictions"), own["stages"]["predictions"]["miou"]
    path = Path("metrics") / "upper_bound" / f"{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"miou": round(full, DIGITS), "images": len(kept.split("train"))}) + "\n", encoding="utf-8")
    click.echo(
        f"{run}: {weak:.3f} from tags, {full:.3f} from true masks of {len(kept.split('train'))} images: {weak / full:.3f} "
        f"of it"
    )


if __name__ == "__main__":
    main()
