"""One rank's way through all phases of a training. All ranks take the same steps; rank 0 alone writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.core.contracts import Clock, Phase
from pipeline.core.processes import Interrupted, StopRequest
from pipeline.training import checkpoint, deterministic
from pipeline.training.best_weights import BestWeights
from pipeline.training.epochs import ends_epoch, step_count, steps_before
from pipeline.training.exchange import Exchange
from pipeline.training.job import Job
from pipeline.training.loader import Loader
from pipeline.training.loss_log import ROW_STEPS, LossLog
from pipeline.training.loss_scale import LossScale
from pipeline.training.rank import Rank
from pipeline.training.resume import Checkpoint
from pipeline.training.scoring import mean_score, scored_images
from pipeline.training.step import Stepper

CHECKPOINT = "checkpoint.safetensors"


def read_steps(device: str) -> int:
    """After how many steps their figures are read from the device: at once where the host need not wait for it."""
    return 1 if device == "cpu" else ROW_STEPS


class Run:
    """It leaves trained.safetensors and log.csv in job.work.

    Losses, stop requests and whether all is finite are read from the device every read_steps steps. Checkpoints are written
    then, too: never of weights that are not known to be finite.
    """

    def __init__(self, job: Job, trainable: Any, exchange: Exchange, stop: StopRequest) -> None:
        deterministic.use(job.device)
        trainable.to(job.device).train()
        self.job = job
        self.rank = Rank(trainable, job.device, job.precision, job.seed, exchange, stop)
        self.phases: list[Phase] = trainable.phases()
        self.scale, self.log, self.best = LossScale(job.precision), LossLog(job.work / "log.csv"), BestWeights()
        self.checkpoint = Checkpoint(job.work / CHECKPOINT, trainable, self.scale, self.log, self.best)
        self._read_steps = read_steps(job.device)

    def notes(self) -> Iterator[str]:
        """Runs or resumes, with a short note after each step. Interrupted in all ranks, if any of them was asked to stop."""
        self.checkpoint.load()
        while self.checkpoint.phase < len(self.phases):
            phase = self.phases[self.checkpoint.phase]
            if self.checkpoint.step == 0:
                self._restart(phase.restart)
            yield from self._phase(phase, self.checkpoint.phase)
            self.best.restore(self.rank.trainable)
            self.checkpoint.next_phase()
        if self.rank.is_first:
            if not self.log.path.exists():  # no phase has a step
                self.log.write_no_step()
            checkpoint.save_tensors(self.job.work / "trained.safetensors", self.rank.trainable.state_dict(), {})

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
        pinned = job.device != "cpu" and torch.cuda.is_available()
        loader = Loader(job.images, job.seed, phase, number, rank.shards(phase), pinned)
        note = phase.name
        for step, batches in loader.batches(range(self.checkpoint.step, steps), job.loaders):
            clock = Clock(number, step, steps)
            stepper.step(clock, batches)
            self.checkpoint.step = step + 1
            score = self._score(phase, clock)
            if (step + 1) % self._read_steps == 0 or step + 1 == steps or score is not None:
                loss = self._read(phase, clock, stepper, score)
                note = f"{phase.name} loss {loss:.4f}"
            yield note

    def _read(self, phase: Phase, clock: Clock, stepper: Stepper, score: float | None) -> float:
        """What is to be done with the figures of the last steps → the last step's loss.

        A row of the log every ROW_STEPS steps of a phase, at its end, and wherever there is a score.
        """
        figures = stepper.read()
        if self.rank.is_first:
            for of_step in figures:
                self.log.add(of_step.losses)
            done = clock.step + 1
            if done % ROW_STEPS == 0 or done == clock.steps or score is not None:
                before = steps_before(self.phases, clock.phase, len(self.job.images))
                self.log.write_row(step=before + done, phase=phase.name, lr=stepper.lr, score=score)
            self.checkpoint.save_if_due(stepper.optimiser)
        if any(of_step.stop for of_step in figures):
            self._stop(stepper.optimiser)
        return sum(figures[-1].losses.values())

    def _stop(self, optimiser: torch.optim.Optimizer) -> None:
        """Saves the step just made, and ends the run."""
        if self.rank.is_first:
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
