"""The inspection store of a run → its inner maps and the weights of its attention heads, for inner_maps.html.jinja."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import store
from pipeline.core.records import Records


def read(path: Path, records: Records) -> dict[str, Any]:
    """pictures: of each image its id, the class of its maps and a data URL of the JPEG strip; panels: names of the strip's
    panels from left to right; weights: f64[layers,heads] as lists, mean over the images, [] where the method has none."""
    by_id, pictures, panels, weights = records.by_id(), [], [], []
    for image_id, item in store.Store(path, store.INSPECTION):
        if not item["jpeg"].size:  # shown for its surroundings alone
            continue
        tags = by_id[image_id].tags or ()
        panels = item["panels"].tobytes().decode("utf-8").split(",")
        class_name = records.labels.names[tags[0]] if tags else "no class"
        pictures.append({"id": image_id, "class_name": class_name, "source": jpeg_url(item["jpeg"].tobytes())})
        if item["weights"].size:
            weights.append(item["weights"])
    mean = np.mean(weights, axis=0, dtype=np.float64).tolist() if weights else []
    return {"pictures": pictures, "panels": panels, "weights": mean}


def jpeg_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")
