"""A training run ↔ the file from which it goes on after it was cut off, to the same bytes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from pipeline.training import checkpoint
from pipeline.training.best_weights import BestWeights
from pipeline.training.loss_log import LossLog
from pipeline.training.loss_scale import LossScale

CHECKPOINT_SECONDS = 45.0


class Checkpoint:
    """Weights, the optimiser's moments, loss scale, log and best weights of a run, and where it stands.

    phase, step: the first step that is still to be made, both from 0; step is of the phase.
    """

    def __init__(self, path: Path, module: torch.nn.Module, scale: LossScale, log: LossLog, best: BestWeights) -> None:
        self.path, self.module, self.scale, self.log, self.best = path, module, scale, log, best
        self.phase, self.step = 0, 0
        self._moments: dict[str, Tensor] = {}  # of the phase that was cut off, as the file names them
        self._saved = time.monotonic()

    @staticmethod
    def position(path: Path) -> tuple[int, int]:
        """phase and step of a checkpoint's file, both 0 where there is none."""
        if not path.exists():
            return 0, 0
        state = json.loads(checkpoint.read_metadata(path)["state"])
        return state["phase"], state["step"]

    def load(self) -> None:
        """Puts everything back where it was; without a file, all stays as it is."""
        if not self.path.exists():
            return
        tensors, metadata = checkpoint.read_tensors(self.path), checkpoint.read_metadata(self.path)
        self.module.load_state_dict(_below("model.", tensors))
        self._moments = _below("optim.", tensors)
        self.best.tensors = _below("best.", tensors)
        state = json.loads(metadata["state"])
        self.phase, self.step = state["phase"], state["step"]
        self.scale.value, self.scale.finite_steps = state["scale"], state["finite_steps"]
        self.log.rows, self.log.pending = state["rows"], state["pending"]
        self.best.score = state["best_score"]

    def load_moments(self, optimiser: torch.optim.Optimizer) -> None:
        """Gives a fresh optimiser of the current phase the moments of the file, if there are any."""
        if not self._moments:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in self._moments.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})

    def next_phase(self) -> None:
        self.phase, self.step, self._moments = self.phase + 1, 0, {}

    def save_if_due(self, optimiser: torch.optim.Optimizer) -> None:
        """Writes the file if the last time is more than CHECKPOINT_SECONDS ago."""
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save(optimiser)
            self._saved = time.monotonic()

    def save(self, optimiser: torch.optim.Optimizer) -> None:
        tensors = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.tensors.items()}
        for index, moments in optimiser.state_dict()["state"].items():
            tensors |= {
                f"optim.{index}.{key}": torch.as_tensor(value) for key, value in moments.items() if value is not None
            }
        state = {
            "phase": self.phase, "step": self.step, "scale": self.scale.value, "finite_steps": self.scale.finite_steps,
            "rows": self.log.rows, "pending": self.log.pending, "best_score": self.best.score,
        }  # fmt: skip
        checkpoint.save_tensors(self.path, tensors, {"state": json.dumps(state)})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
