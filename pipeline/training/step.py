"""One training step: the shards of a batch → summed gradients → new weights, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.contracts import Batch, Clock, Phase
from pipeline.training import optim
from pipeline.training.data import seed_of
from pipeline.training.loss_scale import LossScale
from pipeline.training.rank import Rank, float_buffers


class Stepper:
    """The steps of one phase in one rank. A step's gradient is the mean over its shards, each computed by itself."""

    def __init__(self, rank: Rank, phase: Phase, scale: LossScale) -> None:
        self.rank, self.phase, self.scale = rank, phase, scale
        groups = rank.trainable.param_groups(phase)
        self.optimiser = optim.make(phase, groups)
        self._trained = [parameter for group in groups for parameter in group.parameters]
        self._buffers = float_buffers(rank.trainable)

    @property
    def lr(self) -> float:
        """The highest of the groups."""
        return max(group["lr"] for group in self.optimiser.param_groups)

    def step(self, clock: Clock, batches: Sequence[Batch]) -> dict[str, float]:
        """batches: of this rank's shards → losses by name, means over all shards (no names in a rank without a shard).

        RuntimeError if a gradient is not finite; fp16 then leaves the step out and goes on with a smaller loss scale.
        """
        names = self._compute(clock, batches)
        size = sum(tensor.numel() for tensor in (*self._trained, *self._buffers))
        gathered = self.rank.exchange.gather(self.phase.shards, size)
        losses = dict(zip(names, gathered.figures[:, : len(names)].mean(dim=0).tolist(), strict=True))
        finite = self._distribute(gathered.sums)
        optim.set_lr(self.optimiser, self.phase.lr * optim.lr_factor(self.phase, clock.step, clock.steps))
        if finite:
            self.optimiser.step()
        elif not self.scale.adapts:
            listed = ", ".join(f"{name} {value:g}" for name, value in losses.items())
            raise RuntimeError(
                f"phase {self.phase.name}, step {clock.step}: gradients are not finite (losses: {listed}); "
                "lower schedule.lr or raise schedule.warmup in the recipe"
            )
        self.scale.update(finite)
        return losses

    def _compute(self, clock: Clock, batches: Sequence[Batch]) -> list[str]:
        """Puts gradients, float buffers and losses of this rank's shards into the exchange → the losses' names."""
        trainable, names = self.rank.trainable, []
        before = [buffer.clone() for buffer in trainable.buffers()]  # each shard starts from the same running statistics
        for shard, batch in zip(self.rank.shards(self.phase), batches, strict=True):
            for buffer, value in zip(trainable.buffers(), before, strict=True):
                buffer.copy_(value)
            torch.manual_seed(seed_of("model", self.rank.seed, clock.phase, clock.step, shard))
            for parameter in self._trained:
                parameter.grad = None
            losses = self._losses(batch, clock)
            (torch.stack(list(losses.values())).sum() * (self.scale.value / self.phase.shards)).backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trained]
            figures = torch.stack([value.detach().double() for value in losses.values()]).cpu()
            self.rank.exchange.put(shard, (*gradients, *self._buffers), figures)
            names = list(losses)
        return names

    def _losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        with self.rank.autocast():
            losses = self.rank.trainable.losses(self.rank.on_device(batch), clock)
        return {name: value.float() for name, value in losses.items()}

    def _distribute(self, sums: Tensor) -> bool:
        """Sets gradients to the sum over shards and float buffers to their mean. False if a gradient is not finite."""
        start, scale = 0, self.scale.value
        for parameter in self._trained:
            gradient = sums[start : start + parameter.numel()].to(parameter.device).reshape(parameter.shape)
            parameter.grad = gradient if scale == 1 else gradient / scale
            start += parameter.numel()
        finite = bool(torch.isfinite(sums[:start].sum()))
        for buffer in self._buffers:
            buffer.copy_((sums[start : start + buffer.numel()] / self.phase.shards).reshape(buffer.shape))
            start += buffer.numel()
        return finite
