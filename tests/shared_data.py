"""Where the golden vectors and real photographs lie on the machines that have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared(*parts: str) -> Path:
    """A file or folder of ../shared; the test is skipped where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"../shared/{'/'.join(parts)} is absent")
    return path


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(shared("golden", f"{name}.npz")) as file:
        return {key: file[key] for key in file.files}
