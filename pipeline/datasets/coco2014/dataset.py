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
from pipeline.listing import DatasetError, duplicates, id_problem

FOLDERS = {"train": "train2014", "val": "val2014"}


@dataclass(frozen=True)
class Params:
    """dataset.options. keep_untagged: whether photographs without annotations are kept, as examples of background."""

    keep_untagged: bool


@dataclass(frozen=True)
class Instance:
    """One annotation.

    class_index  of the category, from 0
    shape        list of polygons f64[2n], x and y px in turn, or a mapping with COCO's RLE
    area         px; crowd: COCO's iscrowd
    """

    class_index: int
    shape: Any
    area: float
    crowd: bool


class Dataset:
    """Classes are the categories in the order of their ids, numbered without gaps. Annotation files are parsed once, here.

    DatasetError where no annotation file can be read. Other problems are collected, and raised by `listings`.
    """

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
                content = json.loads(path.read_bytes())
                by_number = sorted(content["categories"], key=lambda category: category["id"])
                categories = {category["id"]: category["name"] for category in by_number}
                if names and names != list(categories.values()):
                    self.problems.append(f"{path}: its categories differ from those of the other file")
                    continue
                names = list(categories.values())
                self._read(content, split, folder, categories)
            except (ValueError, KeyError, TypeError) as error:
                self.problems.append(f"{path} is no instances file of COCO: {type(error).__name__} {error}")
        if not names:
            raise DatasetError(self.problems or ["the annotation files name no categories"])
        self.labels = LabelSpace(tuple(names))

    def _read(self, content: Mapping[str, Any], split: str, folder: str, categories: dict[int, str]) -> None:
        """Adds the images of one annotation file, and what is wrong with it. categories: id → name, in class order."""
        names = list(categories.values())
        instances_of = self._instances_by_image(content["annotations"], folder, list(categories))
        ids = [Path(image["file_name"]).stem for image in content["images"]]
        self.problems += [f"{image_id!r}: two images have this id" for image_id in duplicates([*self._sizes, *ids])]
        unlisted = sorted(set(instances_of) - {image["id"] for image in content["images"]})
        self.problems += [f"{folder}: annotations of image {number}, which the file does not list" for number in unlisted]
        for image_id, image in zip(ids, content["images"], strict=True):
            path = Path(folder) / image["file_name"]
            problem = id_problem(image["file_name"])
            if problem or not (self.root / path).is_file():
                self.problems.append(problem or f"{image_id!r}: in the annotations, but {path} is missing")
                continue
            instances = instances_of.get(image["id"], [])
            tags = tuple(names[index] for index in sorted({instance.class_index for instance in instances}))
            if tags or self.params.keep_untagged:
                self._sizes[image_id] = (image["height"], image["width"])
                self._instances[image_id] = instances
                self._listings[image_id] = Listing(image_id, path, split, tags, True)

    def _instances_by_image(
        self, annotations: list[dict[str, Any]], folder: str, category_ids: list[int]
    ) -> dict[int, list[Instance]]:
        class_index = {category_id: index for index, category_id in enumerate(category_ids)}
        instances: dict[int, list[Instance]] = defaultdict(list)
        for annotation in annotations:
            category = annotation["category_id"]
            if category not in class_index:
                self.problems.append(f"{folder}: annotation {annotation.get('id')} has the unknown category {category}")
                continue
            shape = annotation["segmentation"]
            if isinstance(shape, list):  # as arrays they take a tenth of the memory
                shape = [np.array(polygon, np.float64) for polygon in shape]
            instances[annotation["image_id"]].append(
                Instance(class_index[category], shape, annotation["area"], bool(annotation["iscrowd"]))
            )
        return instances

    def listings(self) -> list[Listing]:
        """Every image; tags are the categories of all its annotations, crowds included. DatasetError lists every problem."""
        listings = list(self._listings.values())
        if self.problems:
            raise DatasetError(self.problems, listings=listings)
        return listings

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values. Instances are drawn from large to small over the crowd regions, which are IGNORE."""
        from pycocotools import mask as rle  # its import costs time, and only COCO needs it

        h, w = self._sizes[listing.id]
        mask = np.zeros((h, w), np.uint8)
        instances = self._instances[listing.id]
        for instance in sorted(instances, key=lambda instance: (not instance.crowd, -instance.area)):
            shape = instance.shape
            if isinstance(shape, list):
                encoded = rle.merge(rle.frPyObjects(shape, h, w))
            else:
                encoded = rle.frPyObjects(shape, h, w) if isinstance(shape["counts"], list) else shape
            mask[rle.decode(encoded).astype(bool)] = IGNORE if instance.crowd else instance.class_index + 1
        return mask
