"""Operators of torchvision that a torch without CUDA lacks, without which `import timm` fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # the schemas live as long as this object


def define_missing_operators() -> None:
    """Defines the two operators without which `import torchvision` fails. Call before the first import of timm.

    Does nothing where torch has CUDA, torchvision is missing, its extension loads, or the schemas are there already.
    """
    global _library
    if torch.version.cuda is not None or _library is not None or _extension_loads():
        return
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)


def _extension_loads() -> bool:
    spec = importlib.util.find_spec("torchvision")  # finds the package without running it
    if spec is None or spec.origin is None:
        return True
    extension = next(Path(spec.origin).parent.glob("_C*.so"), None)
    if extension is None:
        return False
    try:
        torch.ops.load_library(extension)
    except OSError:
        return False
    return True
