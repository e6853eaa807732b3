"""Where the golden vectors and real photographs lie on the machines that have them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """A file or folder of ../shared. Where it is absent the test is skipped; in CI, which must have it, the test fails."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        absent = f"../shared/{'/'.join(parts)} is absent"
        if os.environ.get("TAG2MASK_SHARED") == "required":
            pytest.fail(absent)
        pytest.skip(absent)
    return path


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(shared("golden", f"{name}.npz")) as file:
        return {key: file[key] for key in file.files}


def golden_weights(keys: Sequence[str], shapes: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """golden/README.md, "Deterministic weights"."""
    made = {}
    for position, (key, shape) in enumerate(zip(keys, shapes, strict=True)):
        size = () if shape == "scalar" else tuple(int(side) for side in shape.split("x"))
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed * 100003 + position))
        if str(key).endswith("running_var"):
            made[str(key)] = 1 + 0.1 * drawn.abs()
            continue
        made[str(key)] = (1 if re.search(r"(norm|bn)[^.]*\.weight$", key) else 0) + 0.05 * drawn
    return made
