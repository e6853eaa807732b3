"""Pseudo-masks → ultralytics' segmentation labels: one polygon per connected part; what that loses is measured and told.

A polygon follows the edges of the outer pixels, INSET inside them: read as numbers, cut off to pixels, or tested at pixel
centres, it is the part itself. The format knows no holes and no 255; parts too small to learn from are left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import yaml
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import Records, file_stem
from pipeline.mask_files import components

SMALLEST = 16  # px; a smaller part is written only where its class has no larger one in the image
INSET = 0.1  # px inside the pixels' outer edges
DIGITS = 6  # of a coordinate in 0..1: 0.005 px of 10,000
HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up as (x, y)


@dataclass
class Losses:
    """Sums over all images; intersection and union are i64[c+1], of the polygons filled again with the masks, 255 left out."""

    intersection: np.ndarray
    union: np.ndarray
    images: int = 0
    polygons: int = 0
    parts_left_out: int = 0
    pixels_left_out: int = 0
    holes_filled: int = 0
    ignored: int = 0
    pixels: int = 0

    def add(self, mask: np.ndarray, filled: np.ndarray) -> None:
        valid = mask != IGNORE
        classes = len(self.union)
        joint = np.bincount(mask[valid].astype(np.int64) * classes + filled[valid], minlength=classes**2)
        table = joint.reshape(classes, classes)
        self.intersection += table.diagonal()
        self.union += table.sum(0) + table.sum(1) - table.diagonal()
        self.images += 1
        self.pixels += mask.size
        self.ignored += int(mask.size - valid.sum())


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """labels/train/<id>.txt, one per image as the format demands, data.yaml, train.txt, images.csv, losses.json and README.txt.

    Images are not copied: README.txt says how to link them to images/train. Memory holds one image and sums.
    """
    folder = out / "labels" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    by_id, classes = records.by_id(), len(records.labels) + 1
    losses = Losses(np.zeros(classes, np.int64), np.zeros(classes, np.int64))
    with (
        (out / "images.csv").open("w", encoding="utf-8", newline="") as table,
        (out / "train.txt").open("w", encoding="utf-8", newline="\n") as listed,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "source", "file"])
        for image_id, mask in masks:
            record, stem = by_id[image_id], file_stem(image_id)
            file = f"images/train/{stem}{file_stem('-' + PurePosixPath(record.path).suffix)[1:]}"
            rows.writerow([image_id, record.path, file])
            listed.write(f"./{file}\n")
            (folder / f"{stem}.txt").write_text("".join(_lines(mask, losses)), encoding="ascii", newline="\n")
    _tell(losses, records.labels, out)


def _lines(mask: np.ndarray, losses: Losses) -> list[str]:
    """One line per part, by class, then as the parts come; counts what is lost."""
    h, w = mask.shape
    scale = np.array([w, h])
    lines, painted = [], []
    for value in np.unique(mask[(mask != BACKGROUND) & (mask != IGNORE)]).tolist():
        numbers, areas = components(mask == value)
        kept = np.flatnonzero(areas >= SMALLEST)
        kept = kept if len(kept) else np.array([areas.argmax()])
        losses.parts_left_out += len(areas) - len(kept)
        losses.pixels_left_out += int(areas.sum() - areas[kept].sum())
        again = np.zeros(len(areas) + 1, np.int32)  # numbers of those that stay: specks may be many, and a box is large
        again[kept + 1] = np.arange(1, len(kept) + 1)
        numbers = again[numbers]
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
            corner = np.array([columns.start, rows.start])
            told = np.round((outline(numbers[rows, columns] == number) + corner) / scale, DIGITS)
            lines.append(f"{value - 1} " + " ".join(f"{one:.{DIGITS}g}" for one in told.ravel()) + "\n")
            points, size = told * scale - corner, (rows.stop - rows.start, columns.stop - columns.start)
            painted.append((int(filled(points, size).sum()), value, (rows, columns), points))
            losses.holes_filled += painted[-1][0] - int(areas[kept[number - 1]])
    losses.polygons += len(painted)
    canvas = np.zeros(mask.shape, np.uint8)
    for _, value, box, points in sorted(painted, key=lambda one: -one[0]):  # ultralytics, too, lays small over large
        area = canvas[box]
        area[filled(points, area.shape)] = value
    losses.add(mask, canvas)
    return lines


def outline(part: np.ndarray) -> np.ndarray:
    """bool[h,w] of one 4-connected part that touches its upper border → f64[n,2] (x, y) px, its outer border, clockwise.

    Corners only. Pixel (x, y) covers [x, x+1) × [y, y+1); every edge lies INSET inside it. Diagonal neighbours do not connect.
    """
    wide = part.shape[1] + 2  # a border of pixels that are not inside
    inside = np.pad(part, 1).tobytes()
    x, y, heading = int(part[0].argmax()), 0, 0
    start, corners = (x, y), []
    # index of the pixel right and left of the way ahead, relative to that of the pixel below and right of the corner
    right, left = (0, -1, -wide - 1, -wide), (-wide, 0, -1, -wide - 1)
    while True:
        dx, dy = HEADINGS[heading]
        x, y = x + dx, y + dy
        at = (y + 1) * wide + x + 1
        if not inside[at + right[heading]]:
            turned = (heading + 1) % 4
        elif inside[at + left[heading]]:
            turned = (heading - 1) % 4
        else:
            continue
        # the inner side is right of the way: of heading (dx, dy) that is (-dy, dx)
        tx, ty = HEADINGS[turned]
        corners.append((x - INSET * (dy + ty), y + INSET * (dx + tx)))
        heading = turned
        if (x, y) == start and heading == 0:
            return np.array(corners)


def filled(points: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Polygon f64[n,2] (x, y) px → bool[h,w] of the pixels whose centres lie inside it, by the even-odd rule."""
    h, w = size
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, h).astype(np.int64)  # rows whose centre lies between the ends
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, h).astype(np.int64)
    count = last - first
    edge = np.repeat(np.arange(len(points)), count)
    rows = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    share = (rows + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    columns = np.clip(np.ceil(x0[edge] + share * (x1[edge] - x0[edge]) - 0.5), 0, w).astype(np.int64)
    crossings = np.zeros((h, w + 1), np.uint8)  # counts modulo 256: odd or even is what matters
    np.add.at(crossings, (rows, columns), 1)
    return (np.cumsum(crossings, axis=1, dtype=np.uint8)[:, :w] & 1).astype(bool)


def _tell(losses: Losses, labels: LabelSpace, out: Path) -> None:
    there = losses.union[1:] > 0
    iou = np.divide(losses.intersection[1:], losses.union[1:], out=np.full(len(labels), np.nan), where=there)
    mean = round(float(iou[there].mean()), 4) if there.any() else None
    figures = {
        "images": losses.images,
        "polygons": losses.polygons,
        "parts_left_out": losses.parts_left_out,
        "pixels_of_parts_left_out": losses.pixels_left_out,
        "pixels_of_holes_filled": losses.holes_filled,
        "pixels_of_255_as_background": losses.ignored,
        "pixels": losses.pixels,
        "mean_iou_with_the_masks": mean,
        "iou_with_the_masks": {
            name: round(float(value), 4) if known else None
            for name, value, known in zip(labels.names, iou, there, strict=True)
        },
    }
    (out / "losses.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    data = {"train": "train.txt", "val": "train.txt", "names": dict(enumerate(labels.names))}
    head = "# Pseudo-masks exist for split train only: put images and labels that you trust under val.\n"
    (out / "data.yaml").write_text(head + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    figure = "no class is there, so no IoU" if mean is None else f"IoU {mean}, mean over the classes,"
    (out / "README.txt").write_text(
        f"""Segmentation labels for ultralytics: one polygon per connected part of a class.

What the format loses, over {losses.images} images (losses.json has it per class):
  {figure} of the polygons, filled again, with the masks (255 left out)
  {losses.holes_filled} px of holes are filled: a polygon has none
  {losses.parts_left_out} parts ({losses.pixels_left_out} px) are left out: under {SMALLEST} px where the class has a larger one
  {losses.ignored} of {losses.pixels} px are 255 (do not learn) in the masks, and background here

Images are not copied. images.csv has each image's path under dataset.root (source) and where ultralytics looks for it
(file, relative to this folder). In this folder, with dataset.root in place of ROOT:

  python -c "
  import csv, pathlib
  for row in csv.DictReader(open('images.csv', encoding='utf-8', newline='')):
      link = pathlib.Path(row['file']); link.parent.mkdir(parents=True, exist_ok=True)
      link.symlink_to(pathlib.Path('ROOT', row['source']).resolve())"
""",
        encoding="utf-8",
    )
