"""COCO 2014 in its official layout: photographs and instances JSON → tags and semantic masks of the 80 classes."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.contracts import Listing
from pipeline.core.labels import IGNORE, MOST_CLASSES, LabelSpace
from pipeline.core.listing import DatasetError, id_problem, twice

FOLDERS = {"train": "train2014", "val": "val2014"}


@dataclass(frozen=True)
class Params:
    """dataset.options. keep_untagged: whether photographs without any object stay (as images whose tags are empty)."""

    keep_untagged: bool


class Dataset:
    """Classes are the JSON's categories in the order of their ids, without gaps."""

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        self._shapes: dict[str, tuple[int, int]] = {}
        self._instances: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self._listings: list[Listing] = []
        problems: list[str] = []
        names: tuple[str, ...] | None = None
        for split, folder in FOLDERS.items():
            path = root / "annotations" / f"instances_{folder}.json"
            if not path.is_file():
                problems.append(f"{path} is missing")
                continue
            told = json.loads(path.read_text(encoding="utf-8"))
            categories = sorted(told["categories"], key=lambda category: category["id"])
            if names is not None and names != tuple(category["name"] for category in categories):
                problems.append(f"{path}: its categories differ from those of the other file")
                continue
            names = tuple(category["name"] for category in categories)
            self._read(told, split, folder, {category["id"]: at for at, category in enumerate(categories)}, names, problems)
        problems += [f"{image_id!r}: two images have this id" for image_id in twice(one.id for one in self._listings)]
        if names is not None and len(names) > MOST_CLASSES:
            problems.append(f"{len(names)} categories are more than uint8 masks can hold")
        if problems or names is None:
            raise DatasetError(problems)
        self.labels = LabelSpace(names)

    def _read(
        self, told: dict[str, Any], split: str, folder: str, position: dict[int, int], names: tuple[str, ...], problems: list[str]
    ) -> None:
        ids = {image["id"]: Path(image["file_name"]).stem for image in told["images"]}
        for instance in told["annotations"]:
            if instance["image_id"] not in ids:
                problems.append(f"annotation {instance.get('id')}: no image {instance['image_id']}")
                continue
            kept = {key: instance[key] for key in ("segmentation", "area", "iscrowd")}
            self._instances[ids[instance["image_id"]]].append({**kept, "position": position[instance["category_id"]]})
        for image in told["images"]:
            image_id = ids[image["id"]]
            problem = id_problem(image_id)
            if problem:
                problems.append(problem)
            if not (self.root / folder / image["file_name"]).is_file():
                problems.append(f"{image_id!r}: {folder}/{image['file_name']} is missing")
            self._shapes[image_id] = (image["height"], image["width"])
            found = sorted({one["position"] for one in self._instances[image_id] if not one["iscrowd"]})
            if found or self.params.keep_untagged:
                tags = tuple(names[at] for at in found)
                self._listings.append(Listing(image_id, Path(folder) / image["file_name"], split, tags, True))

    def listings(self) -> list[Listing]:
        return list(self._listings)

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w]: larger instances first, so that smaller ones lie on top; crowd regions are 255 where nothing else is."""
        from pycocotools import mask as rle  # its import costs time, and only COCO needs it

        h, w = self._shapes[listing.id]
        mask = np.zeros((h, w), np.uint8)
        order = sorted(self._instances[listing.id], key=lambda one: (not one["iscrowd"], -one["area"]))
        for instance in order:
            shape = instance["segmentation"]
            if isinstance(shape, list):
                encoded = rle.merge(rle.frPyObjects(shape, h, w))
            else:
                encoded = rle.frPyObjects(shape, h, w) if isinstance(shape["counts"], list) else shape
            mask[rle.decode(encoded).astype(bool)] = IGNORE if instance["iscrowd"] else instance["position"] + 1
        return mask
