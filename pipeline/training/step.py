"""One training step: the shards of a batch → summed gradients → new weights, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core.contracts import Batch, Clock, Phase
from pipeline.training import optim
from pipeline.training.data import seed_of
from pipeline.training.gradients import Gradients
from pipeline.training.loss_scale import LossScale
from pipeline.training.rank import FIGURES, Rank


@dataclass(frozen=True)
class StepFigures:
    """losses: by name, means over all shards (no names in a rank without a shard); stop: whether a rank was asked to end."""

    losses: dict[str, float]
    stop: bool


@dataclass(frozen=True)
class _Unread:
    """A step's figures while they lie on the device: f64[2 + shards * FIGURES], finite, stop, the shards' losses."""

    clock: Clock
    names: Sequence[str]
    values: Tensor


class Stepper:
    """The steps of one phase in one rank. A step's gradient is the mean over its shards, each computed by itself.

    A step does not wait for the device, except in fp16, where it may have to be left out; `read` does.
    """

    def __init__(self, rank: Rank, phase: Phase, scale: LossScale) -> None:
        self.rank, self.phase, self.scale = rank, phase, scale
        groups = rank.trainable.param_groups(phase)
        self.optimiser = optim.make(phase, groups)
        self._gradients = Gradients(rank, [parameter for group in groups for parameter in group.parameters], phase.shards)
        self._unread: list[_Unread] = []

    @property
    def lr(self) -> float:
        """The highest of the groups."""
        return max(group["lr"] for group in self.optimiser.param_groups)

    def step(self, clock: Clock, batches: Sequence[Batch]) -> None:
        """batches: of this rank's shards. In fp16 a step whose gradients are not finite is left out."""
        names, figures = self._compute(clock, batches)
        finite = self._gradients.end_step()
        stop, losses = self.rank.gather(self.phase, figures)
        self._unread.append(_Unread(clock, names, torch.cat([finite.double()[None], stop[None], losses.flatten()])))
        if self.scale.value != 1:
            self._gradients.divide(self.scale.value)
        optim.set_lr(self.optimiser, self.phase.lr * optim.lr_factor(self.phase, clock.step, clock.steps))
        applied = not self.scale.adapts or bool(finite)
        if applied:
            self.optimiser.step()
        self.scale.update(applied)

    def read(self) -> list[StepFigures]:
        """Of the steps since the last call; waits for the device once.

        RuntimeError if their gradients were not finite, and the weights no longer are: nothing may be saved of them.
        """
        unread, self._unread = self._unread, []
        rows = torch.stack([step.values for step in unread]).cpu()
        return [self._figures(step, row) for step, row in zip(unread, rows, strict=True)]

    def _figures(self, step: _Unread, row: Tensor) -> StepFigures:
        means = row[2:].view(-1, FIGURES)[:, : len(step.names)].mean(dim=0)
        losses = dict(zip(step.names, means.tolist(), strict=True))
        if not row[0] and not self.scale.adapts:
            listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            raise RuntimeError(
                f"phase {self.phase.name}, step {step.clock.step}: gradients are not finite (losses: {listed}); "
                "lower schedule.lr or raise schedule.warmup in the recipe"
            )
        return StepFigures(losses, bool(row[1]))

    def _compute(self, clock: Clock, batches: Sequence[Batch]) -> tuple[list[str], list[Tensor]]:
        """Forward and backward passes of this rank's shards → the losses' names, and f64[losses] of each shard."""
        names, figures = [], []
        self._gradients.begin_step()
        for shard, batch in zip(self.rank.shards(self.phase), batches, strict=True):
            torch.manual_seed(seed_of("model", self.rank.seed, clock.phase, clock.step, shard))
            with self._gradients.shard():
                losses = self._losses(batch, clock)
                (torch.stack(list(losses.values())).sum() * (self.scale.value / self.phase.shards)).backward()
            figures.append(torch.stack([value.detach().double() for value in losses.values()]))
            names = list(losses)
        return names, figures

    def _losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with self.rank.autocast():
            losses = self.rank.trainable.losses(self.rank.on_device(batch), clock)
        return {name: value.float() for name, value in losses.items()}
