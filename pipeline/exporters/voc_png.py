"""Pseudo-masks → PASCAL VOC's layout: SegmentationClass/*.png in VOC's palette, and the list of images. Lossless."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.core.records import Records, file_stem
from pipeline.mask_files import legend_lines, palette_png


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """One PNG per image under a safe file name; ids.csv maps ids to files, classes.txt mask values to names."""
    folder, lists = out / "SegmentationClass", out / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True, exist_ok=True)
    lists.mkdir(parents=True, exist_ok=True)
    with (
        (out / "ids.csv").open("w", encoding="utf-8", newline="") as table,
        (lists / "train.txt").open("w", encoding="utf-8") as names,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "file"])
        for image_id, mask in masks:
            stem = file_stem(image_id)
            (folder / f"{stem}.png").write_bytes(palette_png(mask))
            rows.writerow([image_id, f"SegmentationClass/{stem}.png"])
            names.write(stem + "\n")
    (out / "classes.txt").write_text(legend_lines(records.labels), encoding="utf-8")
