"""The report outside of DVC: from whatever runs have been evaluated, into the folder that stage report writes."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.jobs import report


def write(values: Mapping[str, Any], paths: Mapping[str, Path]) -> Path:
    """Writes the folder anew and returns its page. values: of params.yaml; paths: as stage report's options.

    Never writes into the old folder's files: they may be hard links into DVC's cache.
    """
    folder = paths["report"]
    fresh = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(fresh, ignore_errors=True)
    report.run(values, {**paths, "report": fresh})
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder / "index.html"
