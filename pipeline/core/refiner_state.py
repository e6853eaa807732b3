"""artifacts/<run>/refiner.safetensors: what fit_refiner has learned, which refine applies and evaluate reports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

METADATA_KEY = "refiner"
NETWORK = "network."  # before the key names of a network's tensors, which may compute on a GPU
TAGS = "tags"  # the supervision of every run


def write(
    path: Path, name: str, state: Mapping[str, np.ndarray], params: str = "{}", beside_tags: str | None = None
) -> None:
    """Writes the state of refiner `name` with its FitParams (JSON). beside_tags: the supervision that it adds to the tags.

    All three stand under one metadata key, since safetensors writes several in random order.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    supervision = TAGS if beside_tags is None else f"{TAGS} + {beside_tags}"
    save_file(
        {key: np.ascontiguousarray(state[key]) for key in sorted(state)},
        partial,
        metadata={METADATA_KEY: json.dumps([name, params, supervision])},
    )
    partial.replace(path)


def read(path: Path, name: str) -> dict[str, np.ndarray]:
    """ValueError if the state belongs to another refiner."""
    with safe_open(path, "np") as file:
        fitted_for = json.loads((file.metadata() or {}).get(METADATA_KEY, "[null]"))[0]
        if fitted_for != name:
            raise ValueError(f"{path} was fitted for refiner {fitted_for!r}, not {name!r}; run fit_refiner again")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def fitted_params(path: Path) -> Any:
    """The FitParams, as plain values, that a state was fitted with."""
    return json.loads(_metadata(path)[1])


def supervision(path: Path) -> str:
    """What the pseudo-masks learned from: "tags", or "tags + …" where the refiner brings something that saw more."""
    return str(_metadata(path)[2])


def has_network(path: Path) -> bool:
    """Whether the state holds a network that may compute on a GPU."""
    with safe_open(path, "np") as file:
        return any(key.startswith(NETWORK) for key in file.keys())  # noqa: SIM118 (safe_open is no mapping)


def network_tensors(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The network's tensors in a state, under their own names."""
    return {name.removeprefix(NETWORK): value for name, value in state.items() if name.startswith(NETWORK)}


def _metadata(path: Path) -> list[Any]:
    """[name, params, supervision]. ValueError for a file of an older version, or of something else."""
    with safe_open(path, "np") as file:
        entries = json.loads((file.metadata() or {}).get(METADATA_KEY, "[]"))
    if len(entries) != 3:
        raise ValueError(f"{path} is no refiner of this version of tag2mask; run fit_refiner again")
    return entries
