"""`dvc repro` → events of stages as they begin, end and are passed over, with the figures that they leave.

DVC does the work. This reads what it prints, so that a person sees a line per stage.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# DVC's advice and bookkeeping between stages
HINTS = re.compile(
    r"^(> .*|Updating lock file .*|Generating lock file .*|To track the changes.*|\s+git add .*|To enable auto staging.*"
    r"|\s+dvc config core.autostage.*|Use `dvc push`.*|Data and pipelines are up to date\.|)$"
)

Kind = Literal["begun", "done", "unchanged", "cached", "failed", "interrupted", "output"]
LINES: tuple[tuple[re.Pattern[str], Kind], ...] = (
    (re.compile(r"^Running stage '(.+)':$"), "begun"),
    (re.compile(r"^Stage '(.+)' didn't change, skipping$"), "unchanged"),
    (re.compile(r"^Stage '(.+)' is cached - skipping run, checking out outputs$"), "cached"),
)


@dataclass(frozen=True)
class Event:
    """What happened to a stage. kind `output`: a line that the stage itself printed; name is then that line.
    `interrupted`: by the user, who pressed Ctrl-C.
    """

    kind: Kind
    name: str


def repro(targets: Sequence[str], environment: Mapping[str, str]) -> Iterator[Event]:
    """Runs `dvc repro` on the targets, or on everything, here. Progress and errors go to stderr as ever."""
    command = [sys.executable, "-m", "dvc", "repro", *targets]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(environment), errors="replace")
    assert process.stdout is not None
    running: str | None = None
    try:
        for line in map(str.rstrip, process.stdout):
            event = _event(line)
            if event is None or event.kind == "output":
                if event is not None:
                    yield event
                continue
            if running is not None:
                yield Event("done", running)
            running = event.name if event.kind == "begun" else None
            yield event
    except KeyboardInterrupt:
        process.wait()  # the stage and DVC have got the signal, too
        yield Event("interrupted", running or "dvc")
        return
    failed = process.wait() != 0
    if running is not None:
        yield Event("failed" if failed else "done", running)
    elif failed:
        yield Event("failed", "DVC, before a stage began,")


def _event(line: str) -> Event | None:
    """What a line that DVC or a stage has printed says; None for DVC's advice and bookkeeping."""
    for pattern, kind in LINES:
        if match := pattern.match(line):
            return Event(kind, match[1])
    return None if HINTS.match(line) else Event("output", line)


def seconds(stage: str, provenance: Path) -> float | None:
    """Wall seconds of a stage's last run, or None where it leaves no provenance."""
    path = provenance / f"{stage}.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.is_file() else None


def figures(stage: str) -> str:
    """What a stage that has just ended leaves to read: the last losses of a training, the quality of masks; else ""."""
    kind, _, run = stage.partition("@")
    if kind in ("train", "retrain"):
        return _losses(Path("plots") / run / f"{kind}.csv")
    path = Path("metrics") / f"{run}.json"
    return _quality(json.loads(path.read_text(encoding="utf-8"))) if kind == "evaluate" and path.is_file() else ""


def _losses(path: Path) -> str:
    with path.open(encoding="utf-8", newline="") as file:
        rows = deque(csv.DictReader(file), maxlen=1)
    return "" if not rows else f"step {rows[0]['step']}, loss {float(rows[0]['loss']):.3g}"


def _quality(figures: Mapping[str, Any]) -> str:
    """Of metrics/<run>.json: mIoU from stage to stage; without truth the foreground's fraction, and tags without a pixel."""
    if "miou" in figures:
        miou = [f"{stage.replace('_', ' ')} {value:.3f}" for stage, value in figures["miou"].items()]
        return "mIoU: " + " → ".join(miou)
    coverage, empty = figures.get("coverage", {}).get("pseudo_masks"), figures.get("tagged_classes_without_pixels")
    return "" if coverage is None or empty is None else f"coverage {coverage:.0%}, {empty:.0%} of tags have no pixel"


def targets_of(runs: Sequence[str], until: str | None, known: Sequence[str]) -> list[str]:
    """DVC's names of what is to be made: of these runs, or of all, up to a stage; [] is everything with the report.

    ValueError for a run that params.yaml does not name.
    """
    unknown = [name for name in runs if name not in known]
    if unknown:
        raise ValueError(f"no run {', '.join(map(repr, unknown))} in params.yaml; there are {', '.join(known)}")
    if not runs and until is None:
        return []
    if until == "prepare":
        return ["prepare"]
    return [f"{until or 'evaluate'}@{name}" for name in runs or known]
