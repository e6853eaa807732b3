"""Modules ↔ safetensors files with metadata from which they are built again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

METADATA_KEY = "tag2mask"  # one key only: safetensors writes several in random order, and bytes must be the same


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes `path` as a whole, or not at all. A model's metadata has `plugin`, and as JSON `labels` and `section`."""
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    clean = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(clean, partial, metadata={METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)})
    partial.replace(path)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata that save_tensors wrote. ValueError if the file has none."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} has no {METADATA_KEY} metadata: it was not written by this pipeline")
    return json.loads(metadata[METADATA_KEY])


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def load_into(module: torch.nn.Module, path: Path) -> None:
    """Loads the file's tensors strictly: RuntimeError names missing and unexpected keys."""
    module.load_state_dict(read_tensors(path))
