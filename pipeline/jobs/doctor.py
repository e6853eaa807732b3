"""The machine and params.yaml → findings: what is present, and what to do where something is missing."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

from pipeline.core import sections
from pipeline.core.config import ParamsError
from pipeline.jobs import check
from pipeline.nn.torchvision_guard import define_missing_operators

MIN_FREE_GIB = 5


@dataclass(frozen=True)
class Finding:
    """subject: what was checked; state: its state; advice: what to do, None where nothing is wrong."""

    subject: str
    state: str
    advice: str | None

    @property
    def text(self) -> str:
        """Lines for the terminal."""
        mark = "ok  " if self.advice is None else "FIX "
        return f"{mark} {self.subject}: {self.state}" + (f"\n     → {self.advice}" if self.advice else "")


def python() -> Finding:
    """Python's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "Python", version, None if sys.version_info >= (3, 11) else "install Python 3.11 or newer, then `make setup`"
    )


def tool(name: str, advice: str) -> Callable[[], Finding]:
    """A check that a program is on the path."""

    def finding() -> Finding:
        path = shutil.which(name)
        return Finding(name, path or "missing", None if path else advice)

    return finding


def package(module: str, distribution: str) -> Callable[[], Finding]:
    """A check that a module can be imported."""

    def finding() -> Finding:
        try:
            define_missing_operators()  # torchvision beside a CPU-only torch
            importlib.import_module(module)
        except Exception as error:
            return Finding(distribution, f"cannot be imported: {error}", "rm -rf .venv && make setup")
        return Finding(distribution, metadata.version(distribution), None)

    return finding


def cuda() -> Finding:
    """CUDA devices and their memory."""
    import torch

    if not torch.cuda.is_available():
        reason = "this torch is built for CPU" if torch.version.cuda is None else "no driver or no device"
        return Finding("CUDA", f"none ({reason}); everything runs on {len(os.sched_getaffinity(0))} cores", None)
    devices = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return Finding("CUDA", ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices), None)


def bf16() -> Finding:
    """Whether this machine computes in bf16 faster than in fp32."""
    from pipeline.training import precision

    device, where = check.processor()
    if precision.is_fast("bf16", device):
        return Finding("bf16", f"this {where} has instructions for it", None)
    return Finding("bf16", f"this {where} only emulates it: `precision: fp32` is faster here", None)


def disk() -> Finding:
    """Free space of the working directory's disk."""
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding(
        "disk",
        f"{free:.0f} GiB free",
        None if free > MIN_FREE_GIB else f"free at least {MIN_FREE_GIB} GiB: DVC keeps every result",
    )


def links() -> Finding:
    """Whether hard links work here, by which DVC's cache and the workspace share bytes."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        source, target = Path(folder) / "a", Path(folder) / "b"
        source.write_bytes(b"x")
        try:
            target.hardlink_to(source)
        except OSError:
            return Finding("DVC links", "copy: this file system has no hard links, so results take their space twice", None)
    return Finding("DVC links", "hard links work: results take their space once", None)


def params() -> Finding:
    """Problems of params.yaml and its recipes."""
    problems = check.problems()
    return Finding(
        "params.yaml",
        "well" if not problems else "\n".join(problems),
        None if not problems else "edit params.yaml, or the recipe that is named",
    )


def inputs() -> Finding:
    """Initial weights of the runs, and the data set."""
    try:
        values = sections.read()
        root = Path(sections.dataset(values).root)
        runs = [sections.Settings.read(name).run for name in sections.runs(values)]
    except ParamsError:
        return Finding("inputs", "params.yaml must be corrected first", "edit params.yaml")
    weights = {path for run in runs for path in (run.init, run.segmenter_init)}
    trained = {f"artifacts/{name}/model.safetensors" for name in values["methods"]}  # a run may start from another's model
    missing = sorted(path for path in weights - trained if not Path(path).is_file())
    if missing:
        return Finding(
            "inputs", f"missing: {', '.join(missing)}", "put the weights there (data/weights/README.md), or name others"
        )
    if not root.is_dir():
        return Finding(
            "inputs",
            f"dataset.root {root} is no folder",
            "`make data` draws the scenes; else set dataset.root in params.yaml",
        )
    return Finding("inputs", f"weights and {root} are there", None)


CHECKS: tuple[Callable[[], Finding], ...] = (
    python,
    tool("g++", "apt-get install g++ (pydensecrf is compiled once)"),
    tool("git", "apt-get install git (DVC needs it)"),
    package("torch", "torch"),
    package("torchvision", "torchvision"),
    package("timm", "timm"),
    package("pydensecrf.densecrf", "pydensecrf"),
    package("h5py", "h5py"),
    package("open_clip", "open_clip_torch"),
    package("dvc", "dvc"),
    cuda,
    bf16,
    disk,
    links,
    params,
    inputs,
)
PACKAGES = CHECKS[:10]  # without them nothing runs


class Environment(Protocol):
    """`pipeline.runtime` fills it."""

    def described(self) -> list[tuple[str, str, str | None]]:
        """Subject, state, and what to do where something is missing. SystemExit where a variable is wrong."""
        ...


def findings(environment: Environment, *, packages_only: bool) -> list[Finding]:
    """Findings of all checks, or only of tools and packages."""
    if packages_only:
        return [check() for check in PACKAGES]
    return [*(check() for check in CHECKS), *processes(environment)]


def processes(environment: Environment) -> list[Finding]:
    """The engine, processes and threads, as variables of the environment say."""
    try:
        return [Finding(*description) for description in environment.described()]
    except SystemExit as error:
        return [Finding("environment", str(error), "set the variable so, or unset it")]
