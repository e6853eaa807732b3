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
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": code, **threads}})
    return ray


def places(device: str) -> int:
    """GPUs of the cluster or, for the device cpu, its cores."""
    return int(connect().cluster_resources().get("CPU" if device == "cpu" else "GPU", 0))
