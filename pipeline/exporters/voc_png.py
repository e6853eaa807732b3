"""Pseudo-masks as a VOC tree: SegmentationClass/*.png in VOC's palette, and the list of them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.core.labels import LabelSpace
from pipeline.core.records import file_stem
from pipeline.imaging.palette import voc_palette


def write(masks: Iterator[tuple[str, np.ndarray]], labels: LabelSpace, out: Path) -> None:
    """One PNG per image, file names made safe; ids.csv maps ids to files, classes.txt lists the mask values."""
    folder, lists = out / "SegmentationClass", out / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    colours = voc_palette().tobytes()
    with (
        (out / "ids.csv").open("w", encoding="utf-8", newline="") as table,
        (lists / "train.txt").open("w", encoding="utf-8") as names,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "file"])
        for image_id, mask in masks:
            stem = file_stem(image_id)
            image = Image.fromarray(mask)
            image.putpalette(colours)
            image.save(folder / f"{stem}.png")
            rows.writerow([image_id, f"SegmentationClass/{stem}.png"])
            names.write(stem + "\n")
    lines = ["0 background", *(f"{value} {name}" for value, name in enumerate(labels.names, 1)), "255 ignore"]
    (out / "classes.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
