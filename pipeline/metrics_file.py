"""metrics/<run>.json: its schema and version, which evaluate writes and the report reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA, VERSION = "metrics", 2
HEADER = {"schema": SCHEMA, "version": VERSION}  # its first keys


def read(path: Path) -> dict[str, Any]:
    """The figures of a run as plain values. FileNotFoundError; ValueError for another schema or version."""
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
