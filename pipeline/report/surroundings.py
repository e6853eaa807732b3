"""The inspection store of a run → what it suppresses in the surroundings of each class, for surroundings.html.jinja."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core import store
from pipeline.core.records import Records
from pipeline.report.inner_maps import jpeg_url


def read(path: Path, records: Records) -> dict[str, Any]:
    """description: what is suppressed, in words; "" where the method suppresses nothing of the kind.
    classes: in the order of their indices; of each its name, own and other (mean cosine over the images of the class, and
    over all other images), images (how many these are), pictures by descending cosine.
    """
    description, classes = "", {}
    for image_id, item in store.Store(path, store.INSPECTION):
        description = description or item["description"].tobytes().decode("utf-8")
        strips, start = item["strips"].tobytes(), 0
        for row, class_index in enumerate(item["beside"].tolist()):
            end = start + int(item["strip_bytes"][row])
            own, other = item["means"][row].tolist()
            name, images = records.labels.names[class_index], item["images"][row].tolist()
            values = classes.setdefault(
                class_index, {"name": name, "own": own, "other": other, "images": images, "pictures": []}
            )
            picture = {"id": image_id, "cosine": float(item["match"][row]), "source": jpeg_url(strips[start:end])}
            values["pictures"].append(picture)
            start = end
    for values in classes.values():
        values["pictures"].sort(key=lambda picture: (-picture["cosine"], picture["id"]))
    return {"description": description, "classes": [classes[class_index] for class_index in sorted(classes)]}
