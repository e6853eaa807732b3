"""(open set, name) → its module, imported on demand and by name only; nothing registers itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_PIPELINE = Path(__file__).resolve().parents[1]
_FAMILY_FILE = {"nn": ".backbone"}  # a backbone family is a folder whose face is backbone.py


def available(kind: str) -> list[str]:
    """Names that `load(kind, …)` takes, sorted. kind: methods, refiners, segmenters, datasets, exporters or nn."""
    folder = _PIPELINE / kind
    if kind in _FAMILY_FILE:
        return sorted(entry.name for entry in folder.iterdir() if (entry / "backbone.py").exists())
    return sorted(entry.stem for entry in folder.glob("*.py") if entry.stem != "__init__")


def load(kind: str, name: str) -> ModuleType:
    """The module of one plug-in. ValueError lists what there is."""
    names = available(kind)
    if name not in names:
        raise ValueError(f"no {name!r} in pipeline/{kind}; there are {', '.join(names)} (edit params.yaml)")
    return importlib.import_module(f"pipeline.{kind}.{name}{_FAMILY_FILE.get(kind, '')}")
