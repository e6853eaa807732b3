"""`python -m benchmarks.ablation benchmarks/ablations/NAME.yaml --out FOLDER`: rows of changes to one run → mIoU of each,
over seeds.

A file names a preset, one of its runs, seeds and rows; each row sets some keys of the preset or of the run's recipe. Rows
whose training is the same share it, and what is finished is kept in FOLDER, under a key of its settings alone: take a new
FOLDER after a change of code or of `images`. Masks are only read to score, as in evaluate; no row chooses by them.
"""

from __future__ import annotations

import copy
import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.timing import PROJECT
from pipeline import metrics
from pipeline.audit.tally import fitted_threshold, winning_class
from pipeline.core import config, records, sections, store

log = logging.getLogger("ablation")
PROTOCOL, BINS = "background", 100
RECIPE = "recipe.yaml"  # beside the params.yaml of a row
# evaluate's name → ours; refined labels are what export would make pseudo-masks of
SCORED = {
    "score_maps": "score maps", "decoder": "decoder", "refined": "pseudo-masks", "score_maps_val": "score maps, val",
    "decoder_val": "decoder, val",
}  # fmt: skip
FIGURES = ("score maps", "best threshold", "pseudo-masks", "score maps, val", "decoder, val")


@dataclass(frozen=True)
class Row:
    """name: as the table shows it; set: dotted key → its value. A key begins with a section of params.yaml or of a
    recipe."""

    name: str
    set: Any


@dataclass(frozen=True)
class Plan:
    """preset: file; run: of it; common: set in every row; images: train images at most, the first by id, or null for all;
    classes: those whose own IoU of the score maps is shown, too."""

    preset: str
    run: str
    seeds: tuple[int, ...]
    images: int | None
    classes: tuple[str, ...]
    common: Any
    rows: tuple[Row, ...]


def read(path: Path) -> Plan:
    return config.parse(Plan, config.read(path), "plan", path)


def settings_of(plan: Plan, row: Row, seed: int) -> sections.Settings:
    """The preset cut down to the run, and the run's recipe, with the row's changes; files are named from anywhere.

    ParamsError where a key is set that neither has.
    """
    changes = copy.deepcopy(plan.common | row.set)
    params = config.read(PROJECT / plan.preset)
    params["methods"] = {plan.run: config.section(params, "methods", plan.run, file=PROJECT / plan.preset)}
    of_params = {key: value for key, value in changes.items() if key.split(".")[0] in sections.TOP_LEVEL}
    _set(params, of_params, f"row {row.name!r}", plan.preset)
    run = params["methods"][plan.run]  # a change may have named another recipe
    recipe = sections.read_recipe(PROJECT / run["recipe"])
    _set(recipe, {key: value for key, value in changes.items() if key not in of_params}, f"row {row.name!r}", run["recipe"])
    recipe["train"]["seed"] = seed
    params["dataset"]["root"] = str(PROJECT / params["dataset"]["root"])
    run |= {"init": str(PROJECT / run["init"]), "recipe": RECIPE}
    return sections.Settings(
        plan.run, config.parse(sections.Run, run, f"methods.{plan.run}"), sections.dataset(params), params, recipe
    )


def _set(values: dict[str, Any], changes: Mapping[str, Any], who: str, file: str) -> None:
    """Sets dotted keys of `values`, the content of `file`. ParamsError where it has no such key."""
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for part in path:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            raise config.ParamsError(f"{who} sets {key}, which {file} does not have")
        section[last] = value


def write(settings: sections.Settings, folder: Path) -> None:
    """params.yaml and the recipe that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("params.yaml", settings.params), (RECIPE, settings.recipe)):
        (folder / name).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def link_code(folder: Path) -> None:
    """Gives a folder the project's code by a link: params.yaml and recipes are read where a stage runs."""
    for code in ("pipeline", "stages"):
        if not (folder / code).exists():
            (folder / code).symlink_to(PROJECT / code)


def stage(folder: Path, name: str, *words: object) -> None:
    """Runs a stage in `folder`."""
    link_code(folder)
    command = [sys.executable, "-m", f"stages.{name}", *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{folder}, {name}: {done.stderr[-2000:]}")


def run(settings: sections.Settings, folder: Path, data: Path) -> dict[str, float]:
    """Trains, unless a row with the same training has, extracts, fits, refines and scores one run."""
    write(settings, folder)
    params, name, init = settings.params, settings.name, settings.run.init
    training = store.digest([params["dataset"], params["methods"], settings.recipe["train"]])[:16]
    model, records_words = folder.parent / "models" / f"{training}.safetensors", ("--records", data / "records.h5")
    if not model.exists():
        stage(folder, "train", name, *records_words, "--init", init, "--model", model.resolve(), "--log", "train.csv")
    stage(
        folder, "extract", name, *records_words, "--model", model.resolve(), "--scoremaps", "scoremaps", "--inspection",
        "inner.h5"
    )  # fmt: skip
    maps = ("--scoremaps", "scoremaps", "--refiner", "refiner.safetensors")
    stage(folder, "fit_refiner", name, *records_words, "--init", init, *maps)
    stage(folder, "refine", name, *records_words, *maps, "--refined", "refined")
    return score(folder, data)


def score(folder: Path, data: Path) -> dict[str, float]:
    """mIoU with background of what a folder holds, 255 of the truth excluded."""
    read_records, truth = records.read(data / "records.h5"), store.Store(data / "truth.h5", store.TRUTH)
    maps = store.Store(folder / "scoremaps", store.SCORE_MAPS)
    refined, threshold = store.Store(folder / "refined", store.REFINED), fitted_threshold(folder / "refiner.safetensors")
    classes = len(read_records.labels) + 1
    counts: dict[str, np.ndarray] = {}
    histogram = np.zeros((BINS, classes, classes), np.int64)
    for record in read_records:
        if record.id not in truth:
            continue
        mask, fields = truth.read(record.id, "mask"), maps[record.id]
        winner, best, _ = winning_class(fields, record)
        ending = "_val" if record.split == "val" else ""
        labels = {f"score_maps{ending}": np.where(best > threshold, winner, 0).astype(np.uint8)}
        if fields["decoded"].size:
            labels[f"decoder{ending}"] = fields["decoded"]
        if record.split == "train":
            labels["refined"] = refined.read(record.id, "label")
            histogram += metrics.score_histogram(mask, winner, best, classes, BINS)
        for stage_name, label in labels.items():
            counts[stage_name] = counts.get(stage_name, 0) + metrics.confusion(mask, label, classes)
    figures = {
        name: float(metrics.miou(counts[stage_name], protocol=PROTOCOL))
        for stage_name, name in SCORED.items()
        if stage_name in counts
    }
    rates = metrics.iou(counts["score_maps"], protocol=PROTOCOL)
    figures |= {of_class(name): float(value) for name, value in zip(read_records.labels.names, rates[1:], strict=True)}
    return figures | {"best threshold": float(metrics.threshold_curve(histogram).max()), "threshold": threshold}


def of_class(name: str) -> str:
    """What the IoU of a class is called among the figures."""
    return f"IoU of {name}"


def limited(source: Path, data: Path, images: int | None) -> None:
    """records.h5 with the first train images by id, and truth.h5, of a prepared folder."""
    whole = records.read(source / "records.h5")
    train = sorted((record for record in whole if record.split == "train"), key=lambda record: record.id)
    kept = {record.id for record in train[:images]}
    chosen = tuple(record for record in whole if record.split != "train" or record.id in kept)
    data.mkdir(parents=True, exist_ok=True)
    records.write(data / "records.h5", records.Records(whole.labels, chosen, whole.skipped))
    (data / "truth.h5").unlink(missing_ok=True)
    (data / "truth.h5").symlink_to((source / "truth.h5").resolve())


def shown(values: Sequence[float]) -> str:
    """Median, and what the seeds reach from and to."""
    middle = statistics.median(values)
    return f"{middle:.3f}" if len(values) == 1 else f"{middle:.3f} ({min(values):.3f}–{max(values):.3f})"


@click.command()
@click.argument("plan_file", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for what is made; finished rows stay.")
@click.option("--only", multiple=True, help="Names of rows to run; all without.")
def main(plan_file: Path, out: Path, only: tuple[str, ...]) -> None:
    """Runs the rows of PLAN_FILE and prints a table; FOLDER/results.json holds every figure."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan, out = read(plan_file), out.resolve()
    results: dict[str, dict[str, dict[str, float]]] = {}
    data = out / "data"
    for row in plan.rows:
        if only and row.name not in only:
            continue
        for seed in plan.seeds:
            settings = settings_of(plan, row, seed)
            folder = out / store.digest([settings.params, settings.recipe])[:16]
            if not (data / "records.h5").exists():
                whole = out / "whole"
                write(settings, whole)
                stage(whole, "prepare", "--raw", settings.root, "--records", "records.h5", "--truth", "truth.h5")
                limited(whole, data, plan.images)
            done = folder / "figures.json"
            if not done.exists():
                done.write_text(json.dumps(run(settings, folder, data)), encoding="utf-8")
            results.setdefault(row.name, {})[str(seed)] = json.loads(done.read_text(encoding="utf-8"))
            log.info("%s, seed %d: %s", row.name, seed, {k: round(v, 3) for k, v in results[row.name][str(seed)].items()})
            (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    table = Table(title=f"{plan_file.stem}: mIoU, median and range of {len(plan.seeds)} seeds")
    figures = (*FIGURES, *map(of_class, plan.classes))
    for name in ("row", *figures):
        table.add_column(name)
    for name, seeds in results.items():
        cells = [[values[figure] for values in seeds.values() if figure in values] for figure in figures]
        table.add_row(name, *(shown(cell) if cell else "–" for cell in cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
