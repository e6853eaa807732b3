"""The engine that is chosen, whether Ray is there, how many processes and threads → words for `tag2mask doctor`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata


def state(engine: str) -> tuple[str, str | None]:
    """State, and what to do where something is missing."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        missing = engine == "ray"
        advice = "pip install 'tag2mask[ray]', or TAG2MASK_ENGINE=local" if missing else None
        return f"{engine}; Ray, for a cluster, is not installed (pip install 'tag2mask[ray]')", advice
    address = os.environ.get("RAY_ADDRESS")
    cluster = f"RAY_ADDRESS={address}" if address else "without RAY_ADDRESS it starts a cluster on this host"
    return f"{engine}; Ray {version} is there for TAG2MASK_ENGINE=ray, {cluster}", None


def processes(device: str, on_device: int, counts: Mapping[str, int]) -> str:
    """counts: by the variables that set them; on_device: processes that compute on a GPU."""
    gpus = "" if device == "cpu" else f"{on_device} for parts on {device}, "
    return (
        f"{gpus}{counts['TAG2MASK_WORKERS']} for parts on CPU (TAG2MASK_WORKERS), each with {counts['TAG2MASK_LOADERS']} "
        f"threads that decode (TAG2MASK_LOADERS); at most {counts['TAG2MASK_RANKS']} for training (TAG2MASK_RANKS)"
    )
