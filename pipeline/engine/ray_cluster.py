"""The Ray cluster that RAY_ADDRESS names; without it, one that is started on this host."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from pipeline import code_files

CONNECT_SECONDS = 10
TOKEN = (
    "If it asks for a token, as clusters of `ray start` do where one lies in ~/.ray/auth_token: export RAY_AUTH_MODE=token "
    "(and RAY_AUTH_TOKEN on a host that lacks the file)"
)


def connect() -> Any:
    """Module ray, connected. ValueError where it is not installed, or the cluster does not answer or refuses this host."""
    # one try: Ray's further ones, each of up to 30 s, would only repeat what the first has shown
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
        from ray.exceptions import AuthenticationError
    except ImportError as error:
        raise ValueError("TAG2MASK_ENGINE=ray needs Ray: pip install 'tag2mask[ray]'") from error
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"  # without an address Ray would join any cluster of this host
        _check_address(address)
        # a head that is gone ends the stage within a minute; Ray itself says so
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "30")
        code = os.pathsep.join([str(code_files.ROOT), os.environ.get("PYTHONPATH", "")])
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {"env_vars": {"PYTHONPATH": code, **threads}}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
        except (ConnectionError, AuthenticationError) as error:
            reason = "no Ray cluster runs on this host" if address == "auto" else "the Ray cluster refuses this host"
            raise ValueError(f"RAY_ADDRESS={address}: {reason}. {TOKEN}") from error
    return ray


def _check_address(address: str) -> None:
    """ValueError where nothing listens at host:port; Ray would try for minutes."""
    if address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={address} is not allowed: a stage runs on a node of the cluster; give host:6379, or auto"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():  # auto, local
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        hint = "start one with `ray start --head`, or correct RAY_ADDRESS; without it the stage starts its own"
        raise ValueError(f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); {hint}") from error


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
