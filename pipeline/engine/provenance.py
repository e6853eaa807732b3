"""What differs from run to run of a stage → provenance/<stage>.json, and all of them in provenance.js for the report."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "numpy", "h5py", "ray")


def of_process() -> dict[str, Any]:
    """Host, versions of what this process has imported, and peak memory until now."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    imported = [package for package in PACKAGES if package in sys.modules]
    return {
        "peak_memory_mib": round(own / 1024, 1),
        "peak_memory_mib_largest_child": round(children / 1024, 1),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in (*imported, "dvc")},
    }


def write(folder: Path, stage: str, record: Mapping[str, Any]) -> None:
    """A stage's record, and provenance.js anew."""
    folder.mkdir(exist_ok=True)
    _write_atomically(folder / f"{stage}.json", json.dumps(record, indent=1) + "\n")
    write_script(folder)


def write_script(folder: Path) -> None:
    """Writes provenance.js, a call with the content of all *.json of the folder; the report's page loads it if it exists."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    _write_atomically(folder / "provenance.js", f"tag2mask.provenance({json.dumps(records)});\n")


def _write_atomically(path: Path, text: str) -> None:
    """By a rename, since stages of several runs may end, and read each other's files, at the same time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
