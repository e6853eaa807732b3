"""Phase + parameter groups → optimiser and learning rate at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from pipeline.core.contracts import ParamGroup, Phase

POLY_POWER = 0.9  # DeepLab; AFA has 1, which is `linear` here
ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START = 1 / 25
MOMENTUM = 0.9


def decayed(parameters: Iterable[nn.Parameter], factor: float) -> list[ParamGroup]:
    """Groups at `factor` times the learning rate, [] where it is 0. Matrices and kernels are decayed, vectors (biases,
    norms) not."""
    trained = list(parameters) if factor > 0 else []
    groups = (([p for p in trained if p.ndim > 1], 1.0), ([p for p in trained if p.ndim <= 1], 0.0))
    return [ParamGroup(group, factor, decay) for group, decay in groups if group]


def make(phase: Phase, groups: Sequence[ParamGroup]) -> torch.optim.Optimizer:
    """An optimiser over the groups; each keeps its `lr_factor` for set_lr."""
    settings = [
        {
            "params": list(group.parameters),
            "lr": phase.lr * group.lr_factor,
            "lr_factor": group.lr_factor,
            "weight_decay": phase.weight_decay * group.weight_decay_factor,
        }
        for group in groups
    ]
    if phase.optimiser == "adamw":
        return torch.optim.AdamW(settings, lr=phase.lr, foreach=True)
    return torch.optim.SGD(settings, lr=phase.lr, momentum=MOMENTUM, nesterov=True, foreach=True)


def lr_factor(phase: Phase, step: int, steps: int) -> float:
    """Learning rate at `step` (from 0) of `steps` over its peak: linear warm-up, then the phase's schedule to its floor."""
    if step < phase.warmup:
        return (step + 1) / phase.warmup
    t = (step - phase.warmup) / max(1, steps - phase.warmup)
    if phase.schedule == "poly":
        fraction = (1 - t) ** POLY_POWER
    elif phase.schedule == "linear":
        fraction = 1 - t
    elif phase.schedule == "cosine":
        fraction = 0.5 * (1 + math.cos(math.pi * t))
    elif t < ONE_CYCLE_RISE:
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * 0.5 * (1 - math.cos(math.pi * t / ONE_CYCLE_RISE))
    else:
        fraction = 0.5 * (1 + math.cos(math.pi * (t - ONE_CYCLE_RISE) / (1 - ONE_CYCLE_RISE)))
    return phase.lr_floor + (1 - phase.lr_floor) * fraction


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_factor"]
