"""Training batches of noise, for tests of methods."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.core.contracts import Batch


def batch(tags: Any = ((1, 0, 0), (0, 1, 1)), size: int = 64, padding: int = 0) -> Batch:
    """tags: 0 or 1 per image and class; size: px; padding: so many columns at the right are no image."""
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(len(tags), size, size, dtype=torch.bool)
    if padding:
        valid[:, :, -padding:] = False
    return Batch(torch.rand(len(tags), 3, size, size, generator=generator), torch.tensor(tags).float(), valid, None)
