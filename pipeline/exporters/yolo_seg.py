"""Pseudo-masks → ultralytics' segmentation labels, one polygon per connected component. Lossy: losses.json says how much.

A polygon runs along the outer edges of its component's border pixels, INSET px inside them, so that a component without
holes is reproduced by truncation to pixels as well as by tests of pixel centres. The format has no holes and no 255; small
components are left out.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import Records, file_stem
from pipeline.mask_files import components

SMALLEST = 16  # px; a smaller component is written only where it is the largest of its class in the image
INSET = 0.1  # px from the outer edges of border pixels
DIGITS = 6  # decimals of a coordinate in 0..1: at most 0.005 px in an image of 10,000 px
HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # right, down, left, up as (x, y)


@dataclass
class Losses:
    """Sums over all images of what the format loses.

    intersection, union  i64[c+1] px per mask value, of the masks and the rasterised polygons, 255 excluded
    components_left_out, pixels_left_out  of components below SMALLEST
    holes_filled, ignored, pixels         px: holes that polygons cover, 255, all
    """

    intersection: np.ndarray
    union: np.ndarray
    images: int = 0
    polygons: int = 0
    components_left_out: int = 0
    pixels_left_out: int = 0
    holes_filled: int = 0
    ignored: int = 0
    pixels: int = 0

    def add(self, mask: np.ndarray, rasterised: np.ndarray) -> None:
        """Adds an image: its mask and its rasterised polygons, both u8[h,w] mask values."""
        valid = mask != IGNORE
        classes = len(self.union)
        pairs = mask[valid].astype(np.int64) * classes + rasterised[valid]
        confusion = np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        self.intersection += confusion.diagonal()
        self.union += confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        self.images += 1
        self.pixels += mask.size
        self.ignored += int(mask.size - valid.sum())


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Writes labels/train/<id>.txt per image, data.yaml, train.txt, images.csv, losses.json and README.txt. Streams.

    Images are not copied: README.txt says how to link them into images/train.
    """
    folder = out / "labels" / "train"
    folder.mkdir(parents=True, exist_ok=True)
    by_id, classes = records.by_id(), len(records.labels) + 1
    losses = Losses(np.zeros(classes, np.int64), np.zeros(classes, np.int64))
    with (
        (out / "images.csv").open("w", encoding="utf-8", newline="") as table,
        (out / "train.txt").open("w", encoding="utf-8", newline="\n") as image_list,
    ):
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "source", "file"])
        for image_id, mask in masks:
            record, stem = by_id[image_id], file_stem(image_id)
            file = f"images/train/{stem}{file_stem('-' + PurePosixPath(record.path).suffix)[1:]}"
            rows.writerow([image_id, record.path, file])
            image_list.write(f"./{file}\n")
            (folder / f"{stem}.txt").write_text("".join(_lines(mask, losses)), encoding="ascii", newline="\n")
    _write_summary(losses, records.labels, out)


def _lines(mask: np.ndarray, losses: Losses) -> list[str]:
    """One line per component, by class, then in the order of their topmost rows; adds to losses."""
    h, w = mask.shape
    scale = np.array([w, h])
    lines, polygons = [], []
    for value in np.unique(mask[(mask != BACKGROUND) & (mask != IGNORE)]).tolist():
        numbers, areas = components(mask == value)
        kept = np.flatnonzero(areas >= SMALLEST)
        kept = kept if len(kept) else np.array([areas.argmax()])
        losses.components_left_out += len(areas) - len(kept)
        losses.pixels_left_out += int(areas.sum() - areas[kept].sum())
        new_number = np.zeros(
            len(areas) + 1, np.int32
        )  # of the kept ones alone: boxes of many specks would need much memory
        new_number[kept + 1] = np.arange(1, len(kept) + 1)
        numbers = new_number[numbers]
        for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
            corner = np.array([columns.start, rows.start])
            relative = np.round((outline(numbers[rows, columns] == number) + corner) / scale, DIGITS)
            lines.append(f"{value - 1} " + " ".join(f"{coordinate:.{DIGITS}g}" for coordinate in relative.ravel()) + "\n")
            points, size = relative * scale - corner, (rows.stop - rows.start, columns.stop - columns.start)
            area = int(rasterise(points, size).sum())
            polygons.append((area, value, (rows, columns), points))
            losses.holes_filled += area - int(areas[kept[number - 1]])
    losses.polygons += len(polygons)
    canvas = np.zeros(mask.shape, np.uint8)
    for _, value, box, points in sorted(polygons, key=lambda polygon: -polygon[0]):  # small over large, as ultralytics does
        window = canvas[box]
        window[rasterise(points, window.shape)] = value
    losses.add(mask, canvas)
    return lines


def outline(component: np.ndarray) -> np.ndarray:
    """bool[h,w] of a 4-connected component that touches row 0 → corners f64[n,2] (x, y) px of its outer border, clockwise.

    Pixel (x, y) covers [x, x+1) × [y, y+1); the polygon's edges lie INSET px inside the border. Diagonal neighbours are not
    connected.
    """
    wide = component.shape[1] + 2  # a border of pixels that are not inside
    inside = np.pad(component, 1).tobytes()
    x, y, heading = int(component[0].argmax()), 0, 0
    start, corners = (x, y), []
    # offsets of the pixels right and left of the next edge from the pixel below and right of the corner, by heading
    right, left = (0, -1, -wide - 1, -wide), (-wide, 0, -1, -wide - 1)
    while True:
        dx, dy = HEADINGS[heading]
        x, y = x + dx, y + dy
        index = (y + 1) * wide + x + 1
        if not inside[index + right[heading]]:
            next_heading = (heading + 1) % 4
        elif inside[index + left[heading]]:
            next_heading = (heading - 1) % 4
        else:
            continue
        # the component is to the right of the path: for heading (dx, dy) in direction (-dy, dx)
        next_dx, next_dy = HEADINGS[next_heading]
        corners.append((x - INSET * (dy + next_dy), y + INSET * (dx + next_dx)))
        heading = next_heading
        if (x, y) == start and heading == 0:
            return np.array(corners)


def rasterise(points: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Polygon f64[n,2] (x, y) px, (h, w) → bool[h,w], True on pixels whose centres are inside, by the even-odd rule."""
    h, w = size
    x0, y0 = points.T
    x1, y1 = np.roll(points, -1, axis=0).T
    first = np.clip(np.ceil(np.minimum(y0, y1) - 0.5), 0, h).astype(
        np.int64
    )  # first and last row whose centres an edge crosses
    last = np.clip(np.ceil(np.maximum(y0, y1) - 0.5), 0, h).astype(np.int64)
    count = last - first
    edge = np.repeat(np.arange(len(points)), count)
    rows = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    fraction = (rows + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    columns = np.clip(np.ceil(x0[edge] + fraction * (x1[edge] - x0[edge]) - 0.5), 0, w).astype(np.int64)
    crossings = np.zeros((h, w + 1), np.uint8)  # modulo 256: only their parity counts
    np.add.at(crossings, (rows, columns), 1)
    return (np.cumsum(crossings, axis=1, dtype=np.uint8)[:, :w] & 1).astype(bool)


def _summary(losses: Losses, labels: LabelSpace) -> dict[str, Any]:
    """Content of losses.json; IoU None where no class, or not this class, is present."""
    present = losses.union[1:] > 0
    iou = np.divide(losses.intersection[1:], losses.union[1:], out=np.full(len(labels), np.nan), where=present)
    mean = round(float(iou[present].mean()), 4) if present.any() else None
    return {
        "images": losses.images,
        "polygons": losses.polygons,
        "parts_left_out": losses.components_left_out,
        "pixels_of_parts_left_out": losses.pixels_left_out,
        "pixels_of_holes_filled": losses.holes_filled,
        "pixels_of_255_as_background": losses.ignored,
        "pixels": losses.pixels,
        "mean_iou_with_the_masks": mean,
        "iou_with_the_masks": {
            name: round(float(value), 4) if is_present else None
            for name, value, is_present in zip(labels.names, iou, present, strict=True)
        },
    }


def _write_summary(losses: Losses, labels: LabelSpace, out: Path) -> None:
    """Writes losses.json, data.yaml and README.txt."""
    summary = _summary(losses, labels)
    (out / "losses.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    data = {"train": "train.txt", "val": "train.txt", "names": dict(enumerate(labels.names))}
    comment = "# Pseudo-masks exist for split train only: put images and labels that you trust under val.\n"
    (out / "data.yaml").write_text(comment + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")
    mean = summary["mean_iou_with_the_masks"]
    agreement = "no class is there, so no IoU" if mean is None else f"IoU {mean}, mean over the classes,"
    pixels = losses.pixels_left_out
    (out / "README.txt").write_text(
        f"""Segmentation labels for ultralytics: one polygon per connected part of a class.

What the format loses, over {losses.images} images (losses.json has it per class):
  {agreement} of the polygons, filled again, with the masks (255 left out)
  {losses.holes_filled} px of holes are filled: a polygon has none
  {losses.components_left_out} parts ({pixels} px) are left out: under {SMALLEST} px where the class has a larger one
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
