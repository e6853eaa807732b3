"""Training on a GPU: the same sums in the same order, as far as PyTorch has kernels that keep one."""

from __future__ import annotations

import torch


def use(device: str) -> None:
    """To be called before the first step; on the CPU, whose kernels keep an order anyway, it changes nothing.

    An operator without such a kernel warns, and its result may differ in the last bits from run to run. cuBLAS needs a
    variable of the environment as well (engine/threads.py).
    """
    if device == "cpu":
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a kernel for each torch.empty would be for nothing; PyTorch defines the attribute dynamically
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
