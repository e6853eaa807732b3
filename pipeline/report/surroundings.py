"""The inspection store of a column → what its method suppresses beside each class, for surroundings.html.jinja."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from pipeline.core import store
from pipeline.core.records import Records


def read(path: Path, records: Records) -> dict[str, Any]:
    """description: what is suppressed, in words, "" where the method suppresses nothing of the kind; classes, in their order: name, own and
    other (mean cosine over the `images` of the class, and over those of others), pictures from the best match down."""
    description, classes = "", {}
    for image_id, item in store.Store(path, store.INSPECTION):
        description = description or item["description"].tobytes().decode("utf-8")
        strips, at = item["strips"].tobytes(), 0
        for row, label in enumerate(item["beside"].tolist()):
            size = int(item["strip_bytes"][row])
            own, other = item["means"][row].tolist()
            facts = {"name": records.labels.names[label], "own": own, "other": other, "images": item["images"][row].tolist()}
            picture = {
                "id": image_id,
                "match": float(item["match"][row]),
                "source": "data:image/jpeg;base64," + base64.b64encode(strips[at : at + size]).decode("ascii"),
            }
            classes.setdefault(label, facts | {"pictures": []})["pictures"].append(picture)
            at += size
    for one in classes.values():
        one["pictures"].sort(key=lambda picture: (-picture["match"], picture["id"]))
    return {"description": description, "classes": [classes[label] for label in sorted(classes)]}
