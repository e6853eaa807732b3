"""The engine that is chosen, and whether Ray is there → words for `tag2mask doctor`."""

from __future__ import annotations

import os
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
