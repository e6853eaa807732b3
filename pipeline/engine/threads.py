"""One torch thread in every process: cores serve images and shards, sums have a fixed order."""

from __future__ import annotations

import os
import sys


def one_thread() -> None:
    """For this process and those that it starts; to be called before anything is computed.

    Two threads that make MKL's first call of a vector function together can get a kernel of low accuracy
    (pytorch/pytorch#188792).
    """
    # for a torch that is imported later, and for child processes
    os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts: products are summed in one order
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
