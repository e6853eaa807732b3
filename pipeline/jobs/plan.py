"""Rates of a machine + a number of images and of devices → hours, bytes and peak memory of every stage."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core.sections import Settings
from pipeline.jobs.rates import SPLIT_OF, PhaseRate, Rate, Rates

RECORD_BYTES = 300  # of an image in the memory of each process: its records and the index of a store
ONCE = 20_000  # parts of equal cost beyond which they need not be dealt out one by one


@dataclass(frozen=True)
class Machine:
    """workers: processes for parts on the CPU; gpus: 0 for none."""

    workers: int
    gpus: int


@dataclass(frozen=True)
class Row:
    """A stage's cost. memory_mib: peak of all its processes on one host together."""

    stage: str
    seconds: float
    bytes: float
    memory_mib: float


@dataclass(frozen=True)
class Images:
    """Number of images of each split."""

    train: int
    val: int

    def of(self, stage: str) -> int:
        """Those that a stage goes through."""
        split = SPLIT_OF.get(stage)
        return self.train + self.val if split is None else getattr(self, split)


def of_run(settings: Settings, rates: Rates, images: Images, machine: Machine) -> list[Row]:
    """Rows in the order of the stages."""
    stages = rates.runs[settings.name]
    return [_row(stage, rate, rates, images, machine, settings) for stage, rate in stages.items()]


def _row(stage: str, rate: Rate, rates: Rates, images: Images, machine: Machine, settings: Settings) -> Row:
    count = images.of(stage)
    processes = machine.gpus if rate.gpu and machine.gpus else machine.workers
    part = _images_per_part(stage, settings)
    seconds = rate.start + sum(
        cost * _makespan(min(count, _most(kind, count, settings)), part, processes) for kind, cost in rate.image.items()
    )
    folds = settings.recipe["cross_validate"]["folds"] if stage == "cross_validate" else 0
    trainings, trained = (folds, images.train - images.train // max(1, folds)) if folds else (1, images.train)
    ranks = 1
    for phase in rate.phases.values():
        ranks = max(ranks, min(processes, phase.shards))
        seconds += trainings * _training(phase, trained, processes, rates)
    shared = min(processes, math.ceil(count / part)) if rate.image else ranks
    memory = rate.memory_mib + max(shared if shared > 1 else 0, ranks - 1) * rate.worker_mib
    memory += RECORD_BYTES * (images.train + images.val) / 2**20
    return Row(stage, seconds, rate.bytes + rate.bytes_per_image * count, memory)


def _images_per_part(stage: str, settings: Settings) -> int:
    """How many images a worker takes at a time."""
    values: Mapping[str, Any] = settings.params["export"] if stage == "export" else settings.recipe.get(stage, {})
    if stage in ("cross_validate", "relabel"):
        values = settings.recipe["segment"]
    return values.get("images_per_part", 32)


def _most(kind: str, count: int, settings: Settings) -> int:
    """Images of a kind of work at most: the report shows so many."""
    return settings.params["evaluate"]["gallery"] if kind == "pictures" else count


def _makespan(images: int, part: int, processes: int) -> float:
    """Images that the worker with the longest way goes through, where parts go to whoever is free."""
    whole, rest = divmod(images, part)
    if whole >= ONCE:
        return images / processes
    free = [0.0] * processes
    for size in [part] * whole + [rest] * (rest > 0):
        heapq.heapreplace(free, free[0] + size)
    return max(free)


def _training(phase: PhaseRate, images: int, processes: int, rates: Rates) -> float:
    """s of a phase: steps, and scores at the ends of epochs. More ranks share the shards of a step."""
    from pipeline.training.scoring import SCORED_IMAGES  # torch is needed by nothing else here

    steps = max(1, phase.min_steps, round(phase.epochs * images / phase.batch_size)) if phase.epochs else 0
    shared = _shards_of_a_rank(phase, processes) / _shards_of_a_rank(phase, phase.ranks)
    scored = min(images, SCORED_IMAGES) / min(rates.images, SCORED_IMAGES)
    epochs = steps * phase.batch_size / max(1, images)
    return shared * (steps * phase.step + epochs * phase.score * scored)


def _shards_of_a_rank(phase: PhaseRate, processes: int) -> int:
    return math.ceil(phase.shards / min(processes, phase.shards))


def few_shards(rates: Rates, run: str, gpus: int) -> list[str]:
    """Stages whose training cannot use all GPUs, with what to do."""
    return [
        f"{stage}: {phase.shards} shards keep {phase.shards} of {gpus} GPUs busy; a larger schedule.shards uses more"
        for stage, rate in rates.runs[run].items()
        for phase in list(rate.phases.values())[:1]
        if phase.epochs and phase.shards < gpus
    ]


def with_speed(rates: Rates, given: Mapping[str, float]) -> Rates:
    """Rates of networks as a user gives them: stage → images per second of one GPU. ValueError names unknown stages."""
    known = {stage for stages in rates.runs.values() for stage, rate in stages.items() if rate.gpu}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ValueError(f"--speed: {', '.join(unknown)}: allowed are {', '.join(sorted(known))}")
    runs = {
        run: {stage: _faster(rate, given[stage]) if stage in given else rate for stage, rate in stages.items()}
        for run, stages in rates.runs.items()
    }
    return replace(rates, runs=runs)


def _faster(rate: Rate, images_per_second: float) -> Rate:
    """Of one GPU, which computes all shards of a step one after another; more GPUs share them."""
    image = dict.fromkeys(rate.image, 1 / images_per_second)
    phases = {
        name: replace(phase, step=phase.batch_size / images_per_second, ranks=1, score=0.0)
        for name, phase in rate.phases.items()
    }
    return replace(rate, image=image, phases=phases)


def unknown_on_gpus(rates: Rates, given: Mapping[str, float], runs: list[str]) -> list[str]:
    """Stages that compute on GPUs, of which only a CPU's rates are known."""
    if rates.device != "cpu":
        return []
    return list(dict.fromkeys(s for run in runs for s, rate in rates.runs[run].items() if rate.gpu and s not in given))
