"""The training precisions of params.yaml as torch data types."""

from __future__ import annotations

import torch

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: str) -> torch.autocast:
    """Mixed precision on a torch device such as cpu or cuda:1; a context that changes nothing for fp32."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None)
