"""CUDA devices of this host: those that this process sees, and one for each worker or rank."""

from __future__ import annotations

import os
from typing import Any

VARIABLE = "CUDA_VISIBLE_DEVICES"


def visible(device: str) -> list[str]:
    """What a torch device name stands for (cpu, cuda: all of them, cuda:1), as CUDA_VISIBLE_DEVICES names it: numbers or
    UUIDs, none for cpu."""
    if device == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get(VARIABLE, ",".join(map(str, range(count)))).split(",")
    names = [name.strip() for name in listed[:count]]  # CUDA itself stops at the first that is not there
    number = device.partition(":")[2]
    return names[int(number) : int(number) + 1] if number else names


def see_only(name: str) -> None:
    """To be called before torch starts CUDA: this process's only device, as `visible` names it, is cuda:0."""
    os.environ[VARIABLE] = name


def versions(device: str) -> dict[str, Any]:
    """For provenance: models of the GPUs behind a torch device name, versions of CUDA and cuDNN; nothing for cpu, nor where
    the GPUs are other hosts'."""
    names = visible(device)
    if not names:
        return {}
    import torch

    number = device.partition(":")[2]
    numbers = [int(number)] if number else range(len(names))
    return {
        "gpus": [torch.cuda.get_device_name(at) for at in numbers],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
