"""The weights of a phase's best epoch so far."""

from __future__ import annotations

import torch
from torch import Tensor


class BestWeights:
    """tensors: by state-dict name, empty before a first score; score: theirs."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.score: float | None = None

    def keep(self, module: torch.nn.Module, prefixes: tuple[str, ...], score: float | None) -> None:
        """Copies the weights whose names start so, if they score higher than all before. score: None never does."""
        if score is None or (self.score is not None and score <= self.score):
            return
        weights = module.state_dict()
        self.score = score
        self.tensors = {name: value.detach().clone() for name, value in weights.items() if name.startswith(prefixes)}

    def restore(self, module: torch.nn.Module) -> None:
        """At a phase's end: puts the kept weights back into the module, and forgets them. Without a score, all stays."""
        module.load_state_dict(self.tensors, strict=False)
        self.tensors, self.score = {}, None
