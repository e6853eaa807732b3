"""A Trainable + images → trained weights and a CSV of losses. One loop for methods, learned refiners and segmenters.

A step is cut into `shards`; every shard is computed by itself, with one torch thread, and their gradients are summed in
shard order. Ranks (processes) only share out the shards, so the result does not depend on how many there are.

A phase with `keep_best` is scored after each epoch, on a few training images that are always the same, each seen in the same
crop without augmentation, shared out over the ranks as shards are. It ends with the weights of the best epoch.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from pipeline.core import processes
from pipeline.core.contracts import Clock, Phase
from pipeline.core.processes import Interrupted, StopRequest
from pipeline.training import checkpoint, threads
from pipeline.training.best_weights import BestWeights
from pipeline.training.data import TrainingImages
from pipeline.training.epochs import ends_epoch, step_count, steps_before
from pipeline.training.exchange import Exchange, OtherRankFailed, SharedMemory
from pipeline.training.loader import Loader
from pipeline.training.loss_log import ROW_STEPS, LossLog
from pipeline.training.loss_scale import LossScale
from pipeline.training.rank import Rank, float_buffers
from pipeline.training.resume import Checkpoint
from pipeline.training.scoring import mean_score, scored_images
from pipeline.training.step import Stepper

CHECKPOINT = "checkpoint.safetensors"


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

    phases  in their order
    images  number of training images
    steps   of all phases together
    done    steps that an earlier run of the same job has made; this one goes on from there
    notes   runs the job as it is read: a short note, the losses, after each step
    """

    phases: Sequence[Phase]
    images: int
    steps: int
    done: int
    notes: Iterator[str]


def train(job: Job) -> Training:
    """Builds the trainable. Its run leaves `trained.safetensors` and `log.csv` in job.work. ValueError without an image.

    A signal that asks the run to end (SIGINT, SIGTERM) makes it save a checkpoint after the current step and raise
    Interrupted. What another rank raised, the run raises.
    """
    if not len(job.images):
        raise ValueError("there is no training image: records.h5 has none in split train that can be used here")
    threads.single()
    trainable = job.build()
    phases, images = trainable.phases(), len(job.images)
    phase, step = Checkpoint.position(job.work / CHECKPOINT)
    done = steps_before(phases, phase, images) + step
    return Training(phases, images, steps_before(phases, len(phases), images), done, _train(job, trainable))


def _train(job: Job, trainable: Any) -> Iterator[str]:
    """Rank 0, and the start and end of the others."""
    exchange = SharedMemory(
        ranks=job.ranks,
        shards=max(phase.shards for phase in trainable.phases()),
        size=sum(tensor.numel() for tensor in (*trainable.parameters(), *float_buffers(trainable))),
    )
    others, failures = _start_others(job, exchange)
    try:
        with processes.stop_on_signal() as stop:
            run = _Run(job, trainable, exchange, 0, stop)
            yield from run.notes()
    except OtherRankFailed as error:
        _end(others)
        raise _of_rank(error, failures) from None
    except BaseException:
        exchange.abort()
        raise
    finally:
        _end(others)
    if not run.log.path.exists():  # no phase has a step
        run.log.write_no_step()
    checkpoint.save_tensors(job.work / "trained.safetensors", trainable.state_dict(), {})


def _start_others(job: Job, exchange: Exchange) -> tuple[Sequence[BaseProcess], Any]:
    """The processes beside rank 0, and the queue into which one that fails puts text and traceback of its error."""
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    others = [
        context.Process(target=_other_rank, args=(job, exchange, rank, failures), daemon=True)
        for rank in range(1, job.ranks)
    ]
    with processes.deaf_children():
        for other in others:
            other.start()
    return others, failures


def _end(others: Sequence[BaseProcess]) -> None:
    """Waits for processes that have nothing left to do; one that hangs is killed, since it ignores other signals."""
    for other in others:
        other.join(timeout=30)
        if other.is_alive():
            other.kill()


def _of_rank(error: OtherRankFailed, failures: Any) -> RuntimeError:
    """What the failed rank says of it, with its traceback as a note; `error` where it could say nothing."""
    if failures.empty():
        return error
    text, origin = failures.get()
    failure = RuntimeError(text)
    failure.add_note(origin)
    return failure


def _other_rank(job: Job, exchange: Exchange, number: int, failures: Any) -> None:
    """The whole life of a process beside rank 0, which says what is wrong: no traceback comes from here."""
    processes.begin_child()
    threads.single()
    try:
        for _ in _Run(job, job.build(), exchange, number, StopRequest()).notes():
            pass
    except OtherRankFailed:
        sys.exit(1)  # rank 0 knows, or has failed itself
    except Exception as error:
        kind = "" if isinstance(error, (ValueError, RuntimeError, OSError)) else f"{type(error).__name__}: "
        failures.put((f"{kind}{error}", traceback.format_exc()))
        exchange.abort()
        sys.exit(1)


class _Run:
    """One rank's way through all phases of a job. All ranks take the same steps; rank 0 alone writes."""

    def __init__(self, job: Job, trainable: Any, exchange: Exchange, number: int, stop: StopRequest) -> None:
        device = f"cuda:{number}" if job.device == "cuda" and job.ranks > 1 else job.device
        trainable.to(device).train()
        self.job, self.stop = job, stop
        self.rank = Rank(number, job.ranks, trainable, device, job.precision, job.seed, exchange)
        self.phases: list[Phase] = trainable.phases()
        self.scale, self.log, self.best = LossScale(job.precision), LossLog(job.work / "log.csv"), BestWeights()
        self.checkpoint = Checkpoint(job.work / CHECKPOINT, trainable, self.scale, self.log, self.best)

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
                self._stop_if_asked(stepper.optimiser)
            yield f"{phase.name} loss {sum(losses.values()):.4f}"

    def _stop_if_asked(self, optimiser: torch.optim.Optimizer) -> None:
        """Where a signal came: saves the step just made, and ends the run."""
        if self.stop.made:
            self.checkpoint.save(optimiser)
            images, at = len(self.job.images), self.checkpoint
            done = steps_before(self.phases, at.phase, images) + at.step
            steps = steps_before(self.phases, len(self.phases), images)
            raise Interrupted(f"interrupted at step {done} of {steps}; saved; run again to go on")

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
            before = steps_before(self.phases, clock.phase, len(self.job.images))
            self.log.write_row(step=before + done, phase=phase.name, lr=lr, score=score)
