"""COCO 2014 in its official layout: photographs and instances JSON → tags and semantic masks of the 80 classes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.contracts import Listing
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.listing import DatasetError, id_problem, twice

FOLDERS = {"train": "train2014", "val": "val2014"}


@dataclass(frozen=True)
class Params:
    """dataset.options. keep_untagged: whether photographs without any object stay (as images that hold no class)."""

    keep_untagged: bool


@dataclass(frozen=True)
class Instance:
    """One annotated object. shape is a list of polygons f64[2n] or an RLE mapping; position counts classes from 0."""

    position: int
    shape: Any
    area: float
    crowd: bool


class Dataset:
    """Classes are the JSON's categories in the order of their ids, without gaps. Each JSON is parsed once, here."""

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        self._sizes: dict[str, tuple[int, int]] = {}
        self._instances: dict[str, list[Instance]] = {}
        self._listings: dict[str, Listing] = {}
        self.problems: list[str] = []
        names: list[str] = []
        for split, folder in FOLDERS.items():
            path = root / "annotations" / f"instances_{folder}.json"
            if not path.is_file():
                self.problems.append(f"{path} is missing")
                continue
            try:
                told = json.loads(path.read_bytes())
                categories = {one["id"]: one["name"] for one in sorted(told["categories"], key=lambda one: one["id"])}
                if names and names != list(categories.values()):
                    self.problems.append(f"{path}: its categories differ from those of the other file")
                    continue
                names = list(categories.values())
                self._read(told, split, folder, categories)
            except (ValueError, KeyError, TypeError) as error:
                self.problems.append(f"{path} is no instances file of COCO: {type(error).__name__} {error}")
        if not names:
            raise DatasetError(self.problems or ["the annotation files name no categories"])
        self.labels = LabelSpace(tuple(names))

    def _read(self, told: Mapping[str, Any], split: str, folder: str, categories: dict[int, str]) -> None:
        names, position = list(categories.values()), {number: at for at, number in enumerate(categories)}
        of_image: dict[int, list[Instance]] = defaultdict(list)
        for one in told["annotations"]:
            if one["category_id"] in position:
                shape = one["segmentation"]
                if isinstance(shape, list):  # as arrays they take a tenth of the memory
                    shape = [np.array(polygon, np.float64) for polygon in shape]
                of_image[one["image_id"]].append(
                    Instance(position[one["category_id"]], shape, one["area"], bool(one["iscrowd"]))
                )
            else:
                self.problems.append(f"{folder}: annotation {one.get('id')} has the unknown category {one['category_id']}")
        ids = [Path(image["file_name"]).stem for image in told["images"]]
        self.problems += [f"{image_id!r}: two images have this id" for image_id in twice([*self._sizes, *ids])]
        strange = sorted(set(of_image) - {image["id"] for image in told["images"]})
        self.problems += [f"{folder}: annotations of image {number}, which the file does not list" for number in strange]
        for image_id, image in zip(ids, told["images"], strict=True):
            path = Path(folder) / image["file_name"]
            wrong = id_problem(image["file_name"])
            if wrong or not (self.root / path).is_file():
                self.problems.append(wrong or f"{image_id!r}: in the annotations, but {path} is missing")
                continue
            instances = of_image.get(image["id"], [])
            tags = tuple(names[at] for at in sorted({one.position for one in instances}))
            if tags or self.params.keep_untagged:
                self._sizes[image_id] = (image["height"], image["width"])
                self._instances[image_id] = instances
                self._listings[image_id] = Listing(image_id, path, split, tags, True)

    def listings(self) -> list[Listing]:
        """Tags are the categories of all annotations: a class that is only there as a crowd is there."""
        found = list(self._listings.values())
        if self.problems:
            raise DatasetError(self.problems, listings=found)
        return found

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w]: larger instances first, so that smaller ones lie on top; crowd regions are 255 where no object is."""
        from pycocotools import mask as rle  # its import costs time, and only COCO needs it

        h, w = self._sizes[listing.id]
        mask = np.zeros((h, w), np.uint8)
        for one in sorted(self._instances[listing.id], key=lambda one: (not one.crowd, -one.area)):
            if isinstance(one.shape, list):
                encoded = rle.merge(rle.frPyObjects(one.shape, h, w))
            else:
                encoded = rle.frPyObjects(one.shape, h, w) if isinstance(one.shape["counts"], list) else one.shape
            mask[rle.decode(encoded).astype(bool)] = IGNORE if one.crowd else one.position + 1
        return mask
