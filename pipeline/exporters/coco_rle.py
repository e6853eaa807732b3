"""Pseudo-masks → annotations.json of COCO, in compressed RLE: one annotation per class and image. Exact.

Pseudo-masks know classes, not objects, so the form is that of COCO's stuff annotations. Category ids are the mask values.
255 is a category of its own, `ignore` with id 255, whose annotations are crowds: readers of COCO leave crowds out of losses and counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle

from pipeline.core.labels import BACKGROUND, IGNORE
from pipeline.core.records import Records
from pipeline.mask_files import legend


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Streams: annotations go to the file as they come, one small row per image is kept for the list of images.

    file_name is the image's path under dataset.root, tag2mask_id its id. Numbers of images and annotations count from 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    by_id, count = records.by_id(), 0
    images: list[dict[str, Any]] = []
    with (out / "annotations.json").open("w", encoding="utf-8", newline="\n") as file:
        about = {"description": "pseudo-masks of tag2mask; one annotation per class and image, 255 as crowd of category 255"}
        file.write(f'{{"info": {json.dumps(about)},\n"licenses": [],\n"categories": {json.dumps(_categories(records))},\n')
        file.write('"annotations": [')
        for image_id, mask in masks:
            record = by_id[image_id]
            h, w = mask.shape
            images.append(
                {"id": len(images) + 1, "file_name": record.path, "height": h, "width": w, "tag2mask_id": image_id}
            )
            for value in np.unique(mask).tolist():
                if value == BACKGROUND:
                    continue
                count += 1
                file.write(",\n" if count > 1 else "\n")
                file.write(json.dumps({"id": count, "image_id": len(images)} | _annotation(mask, value)))
        file.write('\n],\n"images": [' + ",".join("\n" + json.dumps(image) for image in images) + "\n]}\n")


def _categories(records: Records) -> list[dict[str, Any]]:
    named = legend(records.labels).items()
    return [{"id": value, "name": name, "supercategory": name} for value, name in named if value != BACKGROUND]


def _annotation(mask: np.ndarray, value: int) -> dict[str, Any]:
    coded: Any = rle.encode(np.asfortranarray(mask == value, np.uint8))  # its stub says counts are str, they are bytes
    return {
        "category_id": value,
        "segmentation": {"size": [int(side) for side in coded["size"]], "counts": coded["counts"].decode("ascii")},
        "area": int(rle.area(coded)),
        "bbox": [float(edge) for edge in rle.toBbox(coded)],  # x, y, w, h px
        "iscrowd": int(value == IGNORE),
    }
