"""Training on a GPU: the same sums in the same order."""

from __future__ import annotations

import torch

from pipeline.training import resizing_gradients


def use(device: str) -> None:
    """To be called before the first step; on the CPU, whose kernels keep an order anyway, it changes nothing.

    An operator without a kernel that keeps the order raises RuntimeError. If it only warned, PyTorch would take such kernels
    for attention, too. cuBLAS needs a variable of the environment as well (engine/threads.py).
    """
    if device == "cpu":
        return
    resizing_gradients.register("CUDA")
    torch.use_deterministic_algorithms(True)
    # a kernel for each torch.empty would be for nothing; PyTorch defines the attribute dynamically
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
