"""Every training process computes with one torch thread: processes share the cores, and results must not depend on that."""

from __future__ import annotations

import torch


def single() -> None:
    """To be called in every process before the trainable is built, on CUDA too.

    MKL's first call of a vector function can be wrong if two threads make it (pytorch/pytorch#188792); drawing initial
    weights from a truncated normal distribution is such a call.
    """
    torch.set_num_threads(1)
