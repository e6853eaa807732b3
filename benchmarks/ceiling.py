"""`python -m benchmarks.ceiling METHOD`: a column's segmenter, trained on true masks → metrics/ceiling/<m>.json for the report.

The same segmenter, initial weights, params and number of steps as in stage retrain, on the train images that have masks. It is run by
hand, in a project whose column is finished, and is no stage: no mask of split train may come near a result. The report shows, where the
file is there, what share of the ceiling a method's segmenter reaches. Run it again after a change of retrain, segment or the data.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml

from benchmarks.ablation import link_code
from pipeline import metrics
from pipeline.core import records, sections, store
from pipeline.core.config import ParamsError

DIGITS = 5


def true_masks(read: records.Records, truth: store.Store, out: Path) -> records.Records:
    """Writes a store as export would, of the truth of split train; the records of its images and of split val."""
    there = [record for record in read.split("train") if record.id in truth]
    if not there:
        raise ParamsError("split train has no masks, so there is no ceiling to measure (data/truth.h5)")

    def items() -> Iterator[store.Item]:
        for record in sorted(there, key=lambda one: one.id):
            yield record.id, {"mask": truth.read(record.id, "mask")}

    store.write_part(
        store.part_path(out, 0), store.PSEUDO_MASKS, items(), labels=read.labels, part=0, parts=1, params_digest="", compression="gzip"
    )  # fmt: skip
    kept = {record.id for record in there} | {record.id for record in read.split("val")}
    return records.Records(read.labels, tuple(record for record in read if record.id in kept), ())


def as_many_steps(values: dict[str, Any], method: str, read: records.Records, kept: records.Records) -> dict[str, Any]:
    """Params for a run elsewhere whose epochs make up for the images that have no mask."""
    changed = copy.deepcopy(values)
    changed["dataset"]["root"] = str(Path(values["dataset"]["root"]).resolve())
    changed["retrain"][method]["schedule"]["epochs"] *= len(read.split("train")) / len(kept.split("train"))
    return changed


def miou_on_val(read: records.Records, truth: store.Store, predictions: Path) -> float:
    """mIoU with background of split val's images that have masks, 255 in the truth excluded, as evaluate has it."""
    found, classes = store.Store(predictions, store.PREDICTIONS), len(read.labels) + 1
    counts = np.zeros((classes, classes + 1), np.int64)
    for record in read.split("val"):
        if record.id in truth:
            counts += metrics.confusion(truth.read(record.id, "mask"), found.read(record.id, "label"), classes)
    return float(metrics.miou(counts, protocol="background"))


def run(folder: Path, stage: str, *words: object) -> None:
    """A stage, in `folder`, with its progress shown."""
    subprocess.run([sys.executable, "-m", f"stages.{stage}", *map(str, words)], cwd=folder, check=True)


@click.command()
@click.argument("method")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(".work/ceiling"), help="Folder for what is made on the way."
)
def main(method: str, work: Path) -> None:
    """Trains METHOD's segmenter on the true masks of split train, and scores it on split val."""
    values = sections.read()
    column = sections.column(values, method)
    read, truth = records.read(Path("data/records.h5")), store.Store(Path("data/truth.h5"), store.TRUTH)
    own = json.loads((Path("metrics") / f"{method}.json").read_text(encoding="utf-8"))
    folder = (work / method).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kept = true_masks(read, truth, folder / "masks")
    records.write(folder / "records.h5", kept)
    (folder / "params.yaml").write_text(yaml.safe_dump(as_many_steps(values, method, read, kept)), encoding="utf-8")
    link_code(folder)
    init = Path(column.segmenter_init)
    init = init.resolve() if init.exists() else init
    told = (method, "--records", "records.h5", "--segmenter", "segmenter.safetensors")
    run(folder, "retrain", *told, "--pseudo-masks", "masks", "--init", init, "--log", "log.csv")
    run(folder, "segment", *told, "--predictions", "predictions")
    full, weak = miou_on_val(kept, truth, folder / "predictions"), own["stages"]["predictions"]["miou"]
    path = Path("metrics") / "ceiling" / f"{method}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"miou": round(full, DIGITS), "images": len(kept.split("train"))}) + "\n", encoding="utf-8")
    click.echo(
        f"{method}: {weak:.3f} from tags, {full:.3f} from true masks of {len(kept.split('train'))} images: {weak / full:.3f} of it"
    )


if __name__ == "__main__":
    main()
