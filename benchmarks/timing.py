"""What benchmarks share: drawn photographs and masks, and rows of results."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

SIZE = (375, 500)
CLASSES = 20
RNG_SEED = 0


PROJECT = Path(__file__).resolve().parents[1]
ROUNDS = 2  # of both variants in turn: a machine that slows down for a while slows both


@dataclass(frozen=True)
class Timing:
    """One row: `amount` units of work took `seconds`; the reference, if any, took `reference` for the same work."""

    what: str
    unit: str
    amount: float
    seconds: float
    reference: float | None
    reference_name: str

    def cells(self) -> tuple[str, str, str, str]:
        ours = f"{self.amount / self.seconds:.1f} {self.unit}/s"
        if self.reference is None:
            return self.what, ours, "–", "–"
        plain = f"{self.amount / self.reference:.1f} {self.unit}/s ({self.reference_name})"
        return self.what, ours, plain, f"{self.reference / self.seconds:.2f}"


@dataclass(frozen=True)
class Memory:
    """One row: MiB beyond what stood before the first run."""

    what: str
    mib: float
    reference: float
    reference_name: str

    def cells(self) -> tuple[str, str, str, str]:
        plain = f"{self.reference:.0f} MiB ({self.reference_name})"
        return f"{self.what}: memory", f"{self.mib:.0f} MiB", plain, f"{self.reference / max(self.mib, 1e-9):.2f}"


def photograph(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """u8[h,w,3], smooth with grain, as compressible as a photograph."""
    rng = np.random.default_rng([RNG_SEED, index])
    coarse = rng.integers(0, 255, (size[0] // 24 + 2, size[1] // 24 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(np.int16)
    return np.clip(smooth + rng.integers(-12, 12, smooth.shape), 0, 255).astype(np.uint8)


def mask(index: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """u8[h,w] with two blobs of classes."""
    y, x = np.mgrid[: size[0], : size[1]]
    found = np.zeros(size, np.uint8)
    rng = np.random.default_rng([1, index])
    for _ in range(2):
        cy, cx, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(40, 130)
        found[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = rng.integers(1, CLASSES + 1)
    return found


def best_of(function: Callable[[], object], repeats: int = 3) -> float:
    """Shortest of some runs, after one to warm up: noise only ever adds."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def pair(module: str, ours: str, reference: str, what: str, amount: float, unit: str, name: str) -> list[Timing | Memory]:
    """Both variants in turn, the best time and the peak memory of each."""
    found: dict[str, list[dict[str, float]]] = {ours: [], reference: []}
    for _ in range(ROUNDS):
        for variant in (ours, reference):
            command = [sys.executable, "-m", module, variant]
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
            found[variant].append(json.loads(done.stdout))
    seconds = [min(one["seconds"] for one in found[variant]) for variant in (ours, reference)]
    memory = [min(one["mib"] for one in found[variant]) for variant in (ours, reference)]
    return [Timing(what, unit, amount, seconds[0], seconds[1], name), Memory(what, memory[0], memory[1], name)]


def measure(run: Callable[[], object]) -> str:
    """JSON of the best run's seconds, and the MiB that runs need beyond what stands before the first."""
    before = _peak_kib()
    seconds = best_of(run, 4)
    return json.dumps({"seconds": seconds, "mib": (_peak_kib() - before) / 1024})


def main_of(variants: Mapping[str, Callable[[], Callable[[], object]]]) -> click.Command:
    """The command line of a module that `pair` calls: measures one variant, made by calling it, on one thread."""

    @click.command()
    @click.argument("variant", type=click.Choice(list(variants)))
    def main(variant: str) -> None:
        """Measures one VARIANT."""
        torch.set_num_threads(1)
        click.echo(measure(variants[variant]()))

    return main


def _peak_kib() -> int:
    """Peak resident memory of this process alone (getrusage's holds the parent's from before exec, too). Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
