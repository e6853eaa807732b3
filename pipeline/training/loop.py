"""A Trainable + images → trained weights and a CSV of losses. One loop for methods, learned refiners and segmenters.

A step is cut into `shards`; every shard is computed by itself, with one torch thread, and their gradients are summed in
shard order. Ranks (processes) only share out the shards, so the result does not depend on how many there are.

A phase with `keep_best` is scored after each epoch, on a few training images that are always the same, each seen in the same
crop without augmentation, shared out over the ranks as shards are. It ends with the weights of the best epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.multiprocessing as processes

from pipeline.core.contracts import Clock, Phase
from pipeline.training import checkpoint, threads
from pipeline.training.best_weights import BestWeights
from pipeline.training.data import TrainingImages
from pipeline.training.epochs import ends_epoch, step_count
from pipeline.training.exchange import Exchange, SharedMemory
from pipeline.training.loader import Loader
from pipeline.training.loss_log import ROW_STEPS, LossLog
from pipeline.training.loss_scale import LossScale
from pipeline.training.rank import Rank, float_buffers
from pipeline.training.resume import Checkpoint
from pipeline.training.scoring import mean_score, scored_images
from pipeline.training.step import Stepper


@dataclass(frozen=True)
class Job:
    """All that a rank needs, picklable. `build` makes the trainable with its initial weights, the same in every process."""

    build: Callable[[], Any]
    images: TrainingImages
    seed: int
    precision: str
    work: Path  # checkpoints lie here until the run has ended well
    device: str
    ranks: int
    loaders: int  # threads that decode ahead, per rank; 0 decodes in line


@dataclass(frozen=True)
class Training:
    """A job that is ready to run or resume.

    steps  of all phases together
    notes  runs the job as it is read: a short note after each step
    """

    steps: int
    notes: Iterator[str]


def train(job: Job) -> Training:
    """Builds the trainable. Its run leaves `trained.safetensors` and `log.csv` in job.work. ValueError without an image."""
    if not len(job.images):
        raise ValueError("there is no training image: records.h5 has none in split train that can be used here")
    threads.single()
    trainable = job.build()
    steps = sum(step_count(phase, len(job.images)) for phase in trainable.phases())
    return Training(steps, _train(job, trainable))


def _train(job: Job, trainable: Any) -> Iterator[str]:
    """Rank 0, and the start and end of the others."""
    exchange = SharedMemory(
        ranks=job.ranks,
        shards=max(phase.shards for phase in trainable.phases()),
        size=sum(tensor.numel() for tensor in (*trainable.parameters(), *float_buffers(trainable))),
    )
    others = _start_others(job, exchange)
    try:
        run = _Run(job, trainable, exchange, 0)
        yield from run.notes()
    except BaseException:
        exchange.abort()
        raise
    finally:
        for other in others:
            other.join(timeout=30)
    if not run.log.path.exists():  # no phase has a step
        run.log.write_no_step()
    checkpoint.save_tensors(job.work / "trained.safetensors", trainable.state_dict(), {})


def _start_others(job: Job, exchange: Exchange) -> Sequence[BaseProcess]:
    context = processes.get_context("spawn")
    others = [context.Process(target=_other_rank, args=(job, exchange, rank), daemon=True) for rank in range(1, job.ranks)]
    for other in others:
        other.start()
    return others


def _other_rank(job: Job, exchange: Exchange, number: int) -> None:
    """The whole life of a process beside rank 0."""
    threads.single()
    try:
        for _ in _Run(job, job.build(), exchange, number).notes():
            pass
    except BaseException:
        exchange.abort()
        raise


class _Run:
    """One rank's way through all phases of a job. All ranks take the same steps; rank 0 alone writes."""

    def __init__(self, job: Job, trainable: Any, exchange: Exchange, number: int) -> None:
        device = f"cuda:{number}" if job.device == "cuda" and job.ranks > 1 else job.device
        trainable.to(device).train()
        self.job = job
        self.rank = Rank(number, job.ranks, trainable, device, job.precision, job.seed, exchange)
        self.phases: list[Phase] = trainable.phases()
        self.scale, self.log, self.best = LossScale(job.precision), LossLog(job.work / "log.csv"), BestWeights()
        self.checkpoint = Checkpoint(job.work / "checkpoint.safetensors", trainable, self.scale, self.log, self.best)

    def notes(self) -> Iterator[str]:
        """Runs or resumes, with a short note after each step."""
        self.checkpoint.load()
        while self.checkpoint.phase < len(self.phases):
            phase = self.phases[self.checkpoint.phase]
            if self.checkpoint.step == 0:
                self._restart(phase.restart)
            yield from self._phase(phase, self.checkpoint.phase)
            self.best.restore(self.rank.trainable)
            self.checkpoint.next_phase()

    def _restart(self, prefixes: tuple[str, ...]) -> None:
        """Gives the parts of the trainable whose names start so their initial weights again."""
        if prefixes:
            initial = self.job.build().state_dict()
            parts = {name: value for name, value in initial.items() if name.startswith(prefixes)}
            self.rank.trainable.load_state_dict(parts, strict=False)

    def _phase(self, phase: Phase, number: int) -> Iterator[str]:
        """The rest of a phase from the checkpoint's step on. number: its place in the run, from 0."""
        job, rank, steps = self.job, self.rank, step_count(phase, len(self.job.images))
        stepper = Stepper(rank, phase, self.scale)
        self.checkpoint.load_moments(stepper.optimiser)
        loader = Loader(job.images, job.seed, phase, number, rank.shards(phase))
        for step, batches in loader.batches(range(self.checkpoint.step, steps), job.loaders):
            clock = Clock(number, step, steps)
            losses = stepper.step(clock, batches)
            self.checkpoint.step = step + 1
            score = self._score(phase, clock)
            if rank.number == 0:
                self._log(phase, clock, losses, stepper.lr, score)
                self.checkpoint.save_if_due(stepper.optimiser)
            yield f"{phase.name} loss {sum(losses.values()):.4f}"

    def _score(self, phase: Phase, clock: Clock) -> float | None:
        """Where an epoch ends that may be the best: scores the weights, and keeps them if they are."""
        if not phase.keep_best or not ends_epoch(phase, clock.step, len(self.job.images)):
            return None
        score = mean_score(self.rank, phase, clock.phase, scored_images(self.job.images))
        self.best.keep(self.rank.trainable, phase.keep_best, score)
        return score

    def _log(self, phase: Phase, clock: Clock, losses: dict[str, float], lr: float, score: float | None) -> None:
        """A row every ROW_STEPS steps of a phase, at its end, and wherever there is a score."""
        self.log.add(losses)
        done = clock.step + 1
        if done % ROW_STEPS == 0 or done == clock.steps or score is not None:
            before = sum(step_count(earlier, len(self.job.images)) for earlier in self.phases[: clock.phase])
            self.log.write_row(step=before + done, phase=phase.name, lr=lr, score=score)
