"""Pseudo-masks → segmentation_mask_1.1.zip for CVAT, and the labels that its task needs. Lossless.

Masks are RGB in the colours of labelmap.txt, as CVAT writes them: some readers take a palette PNG for colours, others for
indices. 255 is the label `ignore`, so that annotators can see and correct it. SegmentationObject numbers the connected
components of a class.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.labels import BACKGROUND
from pipeline.core.records import Records
from pipeline.mask_files import colour_png, components, hex_of, label_map, nested_stem, plain_names

ARCHIVE = "segmentation_mask_1.1.zip"
MAX_OBJECTS = 255  # object numbers that 8 bits hold
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can store: same masks, same bytes


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Streams image by image into the archive. labels.json is for the tab `Raw` of CVAT's label constructor.

    Files have the names of ids, folders included: CVAT matches them with the ends of its frames' paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = []
    with zipfile.ZipFile(out / ARCHIVE, "w") as archive:
        _add(archive, "labelmap.txt", label_map(records.labels).encode("utf-8"))
        for image_id, mask in masks:
            names.append(nested_stem(image_id))
            _add(archive, f"SegmentationClass/{names[-1]}.png", colour_png(mask))
            _add(archive, f"SegmentationObject/{names[-1]}.png", colour_png(objects(mask)))
        _add(archive, "ImageSets/Segmentation/default.txt", "".join(f"{name}\n" for name in names).encode("utf-8"))
    labels = [
        {"name": name, "color": hex_of(value), "type": "mask", "attributes": []}
        for value, name in plain_names(records.labels).items()
        if value != BACKGROUND
    ]
    (out / "labels.json").write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # else they depend on the host's system and umask
    entry.compress_type = zipfile.ZIP_STORED if name.endswith(".png") else zipfile.ZIP_DEFLATED
    archive.writestr(entry, data)


def objects(mask: np.ndarray) -> np.ndarray:
    """u8[h,w] mask values → u8[h,w] object numbers, 0 on background: one per connected component, by class and falling area.

    With more than MAX_OBJECTS components the largest keep numbers of their own, and the others of a class share one.
    """
    values = [value for value in np.unique(mask).tolist() if value != BACKGROUND]
    # areas alone: the component numbers of all classes at once would need much memory
    areas = {value: components(mask == value)[1] for value in values}
    by_size = sorted((-int(area), value) for value in values for area in areas[value])
    separate = by_size if len(by_size) <= MAX_OBJECTS else by_size[: MAX_OBJECTS - len(values)]
    out, count = np.zeros(mask.shape, np.uint8), 0
    for value in values:
        objects_of_class = sum(1 for _, class_value in separate if class_value == value)
        rank = np.empty(len(areas[value]), np.int64)
        rank[np.argsort(-areas[value], kind="stable")] = np.arange(len(rank))
        numbers = np.concatenate([[0], count + 1 + np.minimum(rank, objects_of_class)]).astype(np.uint8)
        np.add(out, numbers[components(mask == value)[0]], out=out)
        count += min(objects_of_class + 1, len(rank))
    return out
