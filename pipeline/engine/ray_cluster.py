"""The Ray cluster that RAY_ADDRESS names; without it, one that is started on this host."""

from __future__ import annotations

import logging
import os
from typing import Any

from pipeline import code_files


def connect() -> Any:
    """Module ray, connected. ValueError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("TAG2MASK_ENGINE=ray needs Ray: pip install 'tag2mask[ray]'") from error
    if not ray.is_initialized():
        # a head that is gone ends the stage within a minute; Ray itself says so
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
        code = os.pathsep.join([str(code_files.ROOT), os.environ.get("PYTHONPATH", "")])
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        ray.init(
            os.environ.get("RAY_ADDRESS") or "local",  # without an address Ray would join any cluster of this host
            log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": code, **threads}},
        )  # fmt: skip
    return ray


def places(device: str) -> int:
    """GPUs of the cluster or, for the device cpu, its cores."""
    return int(connect().cluster_resources().get("CPU" if device == "cpu" else "GPU", 0))


def device(asked: str) -> str:
    """TAG2MASK_DEVICE, not cpu → torch device of the cluster's workers. SystemExit where no node has it."""
    if asked == "auto":
        return "cuda" if places("cuda") else "cpu"
    if asked != "cuda":
        raise SystemExit(
            f"TAG2MASK_DEVICE={asked} is not allowed with TAG2MASK_ENGINE=ray, which shares out all GPUs; "
            "allowed is auto, cpu or cuda"
        )
    if not places("cuda"):
        raise SystemExit("TAG2MASK_DEVICE=cuda, but no node of the Ray cluster has a GPU; see `ray status`")
    return asked
