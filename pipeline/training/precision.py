"""The precisions of a recipe as torch data types and settings."""

from __future__ import annotations

import torch

AUTOCAST = {"fp32": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # types of core.config.Precision


def autocast(precision: str, device: str) -> torch.autocast:
    """Mixed precision on a torch device such as cpu or cuda:1; a context that changes nothing for fp32 and tf32.

    Whether TF32 is used is set for good, since a backward pass lies outside the context.
    """
    allow_tf32(precision == "tf32")
    dtype = AUTOCAST[precision]
    return torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None)


def is_fast(precision: str, device: str) -> bool:
    """Whether the device has instructions for products in this precision; without, bf16 and fp16 are emulated, and slower
    than fp32."""
    if AUTOCAST[precision] is None:
        return True
    if device.startswith("cuda"):
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    return any(there is True and name.endswith(precision) for name, there in torch.cpu.get_capabilities().items())


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA rounds the operands of float32 products, convolutions and LSTMs to TF32, which has 10 bits behind the
    point of bf16's range. PyTorch by itself does so in cuDNN alone. The CPU's products stay as they are."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
