"""audit/<run>.json, all figures of a run, and metrics/<run>.json, a dozen of them for DVC: schema, version, reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# up to version 2, metrics/<run>.json held all figures, under schema "metrics"; since version 3 they are in audit/<run>.json
SCHEMA, VERSION = "figures", 3
HEADER = {"schema": SCHEMA, "version": VERSION}  # the first keys of audit/<run>.json


def read(path: Path) -> dict[str, Any]:
    """audit/<run>.json as plain values. FileNotFoundError; ValueError for another schema or version."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run `dvc repro evaluate`")
    figures = json.loads(path.read_text(encoding="utf-8"))
    if difference := version_difference(figures):
        raise ValueError(f"{path} {difference}; run `dvc repro evaluate`")
    return figures


def version_difference(figures: Mapping[str, Any]) -> str:
    """How the schema and version of a file differ from those expected, to follow the file's name; "" where they do not."""
    expected = f"expected is schema {SCHEMA} version {VERSION}"
    schema, version = figures.get("schema"), figures.get("version")
    if version is None:
        return f"has no version, {expected}"
    return "" if (schema, version) == (SCHEMA, VERSION) else f"has schema {schema} version {version}, {expected}"


def mious(values: Mapping[str, Any]) -> dict[str, float]:
    """Stage → mIoU, where there is one. values: of audit/<run>.json, or of metrics/<run>.json of any version."""
    if "stages" not in values:
        return dict(values.get("miou", {}))
    stages = values["stages"].items()
    return {stage: figures["miou"] for stage, figures in stages if figures.get("miou") is not None}
