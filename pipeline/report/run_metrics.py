"""audit/<run>.json and plots/<run>/threshold.csv of the runs → what page, table and comparison show of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline import metrics_file
from pipeline.stage_order import CHAINS, STAGES

Figures = Mapping[str, Any]  # of audit/<run>.json


def read(audit: Path, methods: Sequence[str], upper_bounds: Path | None = None) -> dict[str, dict[str, Any]]:
    """audit/<run>.json of these runs, in their order. FileNotFoundError, or ValueError for a file of another version.

    upper_bounds: folder of <run>.json by benchmarks/upper_bound.py, which is run by hand: their figures under `upper_bound`.
    """
    metrics = {method: metrics_file.read(audit / f"{method}.json") for method in methods}
    for method in methods:
        path = None if upper_bounds is None else upper_bounds / f"{method}.json"
        if path is not None and path.is_file():
            metrics[method]["upper_bound"] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def threshold_curves(folder: Path, methods: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """<run>/threshold.csv of each run as (threshold, mIoU), both 0..1; empty without ground truth."""
    curves = {}
    for method in methods:
        path = folder / method / "threshold.csv"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; run `dvc repro`")
        with path.open(encoding="utf-8", newline="") as file:
            curves[method] = [(float(row["threshold"]), float(row["miou"])) for row in csv.DictReader(file)]
    return curves


def shown_stages(metrics: Mapping[str, Figures]) -> list[str]:
    """Stages that at least one run has, in the order of the pipeline."""
    return [stage for stage in STAGES if any(stage in figures["stages"] for figures in metrics.values())]


def splits_of(metrics: Mapping[str, Figures]) -> dict[str, str]:
    """Stage → the split that its masks are of."""
    return {stage: values["split"] for figures in metrics.values() for stage, values in figures["stages"].items()}


def previous_stages(metrics: Mapping[str, Figures]) -> dict[str, str]:
    """Stage → the stage that its masks come from; of a chain of three, the first one where no run has the second."""
    shown = set(shown_stages(metrics))
    skips = {chain[2]: chain[0] for chain in CHAINS if len(chain) == 3 and chain[1] not in shown}
    return {after: before for chain in CHAINS for before, after in pairwise(chain)} | skips


def miou_drops(figures: Figures) -> list[tuple[str, str, float, float]]:
    """Stages with a lower mIoU than the stage that they come from: (that stage, the stage, mIoU of that, mIoU of it)."""
    miou = metrics_file.mious(figures)
    drops = []
    for chain in CHAINS:
        stages = [stage for stage in chain if stage in miou]
        drops += [(a, b, miou[a], miou[b]) for a, b in pairwise(stages) if miou[b] < miou[a]]
    return drops


def flow_chains(figures: Figures) -> list[list[Figures]]:
    """The steps of `flow` as chains: a step follows the one that ends where it begins. `all`: fractions of all pixels."""
    chains: list[list[Figures]] = []
    for values in figures.get("flow", ()):
        step = {"all": {name: values.get(name, 0.0) for name in ("corrected", "broken")}, **values}
        chain = next((chain for chain in chains if chain[-1]["to"] == step["from"]), None)
        if chain is not None:
            chain.append(step)
        else:
            chains.append([step])
    return chains


def pixel_accuracy(figures: Figures) -> dict[str, float]:
    """Stage → fraction of correct pixels, 0..1; without stages that have no ground truth."""
    stages = figures["stages"].items()
    return {stage: values["pixel_accuracy"] for stage, values in stages if values.get("pixel_accuracy") is not None}
