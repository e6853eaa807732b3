"""The factor that keeps small fp16 gradients from becoming 0."""

from __future__ import annotations

FIRST = 2.0**14
GROWS_AFTER = 2000  # finite steps in a row


class LossScale:
    """value: losses are multiplied by it, and gradients divided. 1 throughout for precisions other than fp16.

    Halves after a step whose gradients are not finite, which is then left out; doubles after GROWS_AFTER finite steps in
    a row.
    """

    def __init__(self, precision: str) -> None:
        self.adapts = precision == "fp16"
        self.value = FIRST if self.adapts else 1.0
        self.finite_steps = 0  # in a row

    def update(self, finite: bool) -> None:
        if not self.adapts:
            return
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.value /= 2
        elif self.finite_steps % GROWS_AFTER == 0:
            self.value *= 2
