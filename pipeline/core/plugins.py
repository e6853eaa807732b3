"""(open set, name) → its module, imported on demand and by name only; nothing registers itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

_PIPELINE = Path(__file__).resolve().parents[1]
_PACKAGE = __name__.removesuffix(".core.plugins")  # `pipeline`, or `tag2mask.pipeline` in a wheel
# A member of an open set is a folder with this module and with what this member alone needs; an exporter is a file.
ENTRIES = {
    "methods": "method", "refiners": "refiner", "segmenters": "segmenter", "datasets": "dataset", "nn": "backbone",
}  # fmt: skip
FILES = "exporters"


def available(kind: str) -> list[str]:
    """Names of the members of an open set, sorted. kind: methods, refiners, segmenters, datasets, exporters or nn."""
    folder = _PIPELINE / kind
    if kind == FILES:
        return sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    return sorted(path.parent.name for path in folder.glob(f"*/{ENTRIES[kind]}.py"))


def load(kind: str, name: str) -> ModuleType:
    """The module of a member of an open set. ValueError lists the known names."""
    names = available(kind)
    if name not in names:
        raise ValueError(f"no {name!r} in pipeline/{kind}; there are {', '.join(names)} (edit params.yaml)")
    return importlib.import_module(f"{_PACKAGE}.{kind}.{name}" + ("" if kind == FILES else f".{ENTRIES[kind]}"))
