"""Pseudo-masks → annotations.json of COCO in compressed RLE, one annotation per class and image. Lossless.

Pseudo-masks are semantic, so the annotations are like those of COCO-Stuff. Category ids are mask values. 255 is the category
`ignore`, with id 255, whose annotations have iscrowd 1: readers of COCO leave crowds out of losses and metrics.
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
    """Writes annotations.json. Streams: only the list of images is held in memory.

    file_name is the image's path under dataset.root, tag2mask_id its id. Ids of images and annotations count from 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    by_id, count = records.by_id(), 0
    images: list[dict[str, Any]] = []
    with (out / "annotations.json").open("w", encoding="utf-8", newline="\n") as file:
        info = {"description": "pseudo-masks of tag2mask; one annotation per class and image, 255 as crowd of category 255"}
        file.write(f'{{"info": {json.dumps(info)},\n"licenses": [],\n"categories": {json.dumps(_categories(records))},\n')
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
    names = legend(records.labels).items()
    return [{"id": value, "name": name, "supercategory": name} for value, name in names if value != BACKGROUND]


def _annotation(mask: np.ndarray, value: int) -> dict[str, Any]:
    encoded: Any = rle.encode(np.asfortranarray(mask == value, np.uint8))  # counts are bytes, though the stub says str
    return {
        "category_id": value,
        "segmentation": {"size": [int(side) for side in encoded["size"]], "counts": encoded["counts"].decode("ascii")},
        "area": int(rle.area(encoded)),
        "bbox": [float(edge) for edge in rle.toBbox(encoded)],  # x, y, w, h px
        "iscrowd": int(value == IGNORE),
    }
