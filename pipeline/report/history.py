"""metrics/<run>.json in git's history → provenance/history.js, from which the page shows how the figures went.

It differs from commit to commit, so it lies beside the report, which is reproducible, and not inside it.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import metrics_file
from pipeline.report.scripts import as_script
from pipeline.stage_order import LAST

COMMITS = 200  # that are looked at, per run
SEPARATOR = "\x1f"


def write(path: Path, metrics: Path, runs: Sequence[str]) -> None:
    """A call of tag2mask.history with run → its points, newest first; nothing is written where there are none."""
    points = {run: points_of(metrics / f"{run}.json") for run in runs}
    if not any(points.values()):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"tag2mask.history({as_script(points)});\n", encoding="utf-8")


def points_of(path: Path) -> list[dict[str, Any]]:
    """Of a run's metrics file, newest first: the work tree, then each commit that changed a figure.

    Each has commit ("" of the work tree), date, subject, miou and coverage by stage. Empty where the file is not there.
    """
    commits = [line.split(SEPARATOR) for line in _git("log", f"-{COMMITS}", "--format=%h%x1f%cs%x1f%s", "--", str(path))]
    versions = [(*commit, _git("show", f"{commit[0]}:./{path.as_posix()}")) for commit in reversed(commits)]
    if path.is_file():
        versions.append(("", "", "", path.read_text(encoding="utf-8").splitlines()))
    points: list[dict[str, Any]] = []
    for commit, date, subject, lines in versions:
        try:
            figures = _figures(json.loads("\n".join(lines)))
        except (ValueError, AttributeError):  # a commit that removed the file, or had something else in it
            continue
        if not points or any(points[-1][name] != value for name, value in figures.items()):
            points.append({"commit": commit, "date": date, "subject": subject, **figures})
    return points[::-1]


def _figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """miou by stage, coverage of the last masks; of metrics/<run>.json of any version."""
    coverage = values.get("coverage", {})
    if "stages" in values:
        coverage = {stage: values["stages"].get(stage, {}).get("coverage") for stage in LAST.values()}
    return {"miou": metrics_file.mious(values), "coverage": {s: value for s, value in coverage.items() if value is not None}}


def _git(*words: str) -> list[str]:
    """Lines that git prints; none where it fails, as outside of a repository."""
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False, encoding="utf-8")
    except FileNotFoundError:
        return []
    return done.stdout.splitlines() if done.returncode == 0 else []
