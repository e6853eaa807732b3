"""Losses of steps → log.csv, with step (from 1, over all phases), phase, lr, loss (the sum), every loss by name, score."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROW_STEPS = 10


class LossLog:
    """rows: what the file holds; pending: the losses of steps since the last row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.pending: list[dict[str, float]] = []

    def add(self, losses: Mapping[str, float]) -> None:
        """The losses of one more step, by name."""
        self.pending.append({"loss": math.fsum(losses.values()), **losses})

    def write_row(self, *, step: int, phase: str, lr: float, score: float | None) -> None:
        """The means of the pending losses, 0 where a step had no loss of that name; writes the file anew."""
        names = sorted({name for losses in self.pending for name in losses} - {"loss"})
        means = {
            name: sum(losses.get(name, 0.0) for losses in self.pending) / len(self.pending) for name in ["loss", *names]
        }
        scored = {} if score is None else {"score": score}
        self.rows.append({"step": step, "phase": phase, "lr": lr, **means, **scored})
        self.pending = []
        self._write()

    def write_no_step(self) -> None:
        """The file of a run without any step: one row of zeros."""
        self.rows = [{"step": 0, "phase": "none", "lr": 0.0, "loss": 0.0}]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(_table(self.rows), encoding="utf-8")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV with the fields of all rows, in the order in which they first occur; floats with six digits."""
    fields = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n", restval="")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    return text.getvalue()
