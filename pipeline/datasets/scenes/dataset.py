"""The demo's drawn scenes with tags and exact masks: `python -m pipeline.datasets.scenes.dataset ROOT` draws them."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from PIL import Image

from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.records import read_mask
from pipeline.datasets.scenes.drawing import (
    GROUNDS,
    Canvas,
    Part,
    bricks,
    cloth,
    cloud,
    colour,
    dome,
    ellipse,
    fibres,
    ground,
    metal,
    plain,
    planks,
    polygon,
    rectangle,
    scales,
    spots,
    tiles,
    wool,
)
from pipeline.tag_table import read_table, split_tags

CLASSES = ("boat", "car", "fish", "house", "mushroom", "sheep")
# classes co-occur with backgrounds, as boats with water in photographs: the usual background of a class, and its frequency
HOME = {"boat": "sea", "car": "street", "fish": "sea", "mushroom": "forest", "sheep": "meadow"}
AT_HOME = {"boat": 0.95, "car": 0.6, "fish": 0.95, "mushroom": 0.6, "sheep": 0.95}
COMPANIONS = {"boat": "fish", "fish": "boat"}  # classes that often occur together
SIZE = 128
SMALLEST_VISIBLE = 40  # px; a class with fewer visible pixels gets no tag
DARK, WHITE, GLASS = np.array([46.0, 43, 50]), np.array([243.0, 240, 232]), np.array([188.0, 220, 236])


def boat(rng: np.random.Generator) -> list[Part]:
    hull = colour(rng, (0.0, 0.12), (0.45, 0.8), (0.4, 0.75))
    sail = colour(rng, (0.05, 0.16), (0.02, 0.3), (0.88, 1))
    depth, bow, width = rng.uniform(0.5, 0.68), rng.uniform(0.6, 0.75), rng.uniform(0.7, 0.92)
    return [
        Part(rectangle(-0.05, -0.98, 0.05, 0.3), plain, np.array([92.0, 66, 46])),
        Part(polygon((0.07, -0.95), (0.07, 0.2), (width, 0.2)), cloth, sail),
        Part(polygon((-0.08, -0.8), (-0.08, 0.2), (-width * 0.85, 0.2)), cloth, sail * 0.94),
        Part(polygon((-1, 0.25), (1, 0.25), (bow, 0.25 + depth), (-bow * 0.9, 0.25 + depth)), planks, hull),
    ]


def car(rng: np.random.Generator) -> list[Part]:
    paint = colour(rng, (0, 1), (0.55, 0.9), (0.55, 0.95))
    top, wheel = rng.uniform(0.5, 0.66), rng.uniform(0.22, 0.28)
    parts = [
        Part(polygon((-0.72, 0.02), (-0.42, -top), (0.35, -top), (0.68, 0.02)), metal, paint),
        Part(polygon((-0.56, 0), (-0.35, -top + 0.1), (-0.04, -top + 0.1), (-0.04, 0)), plain, GLASS),
        Part(polygon((0.05, 0), (0.05, -top + 0.1), (0.29, -top + 0.1), (0.5, 0)), plain, GLASS),
        Part(polygon((-1, 0.05), (-0.94, -0.04), (0.8, -0.04), (1, 0.12), (1, 0.52), (-1, 0.52)), metal, paint),
        Part(ellipse(0.93, 0.2, 0.08, 0.1), plain, np.array([250.0, 235, 150])),
    ]
    for x in (-0.55, 0.55):
        parts.append(Part(ellipse(x, 0.52, wheel, wheel), plain, DARK))
        parts.append(Part(ellipse(x, 0.52, wheel * 0.45, wheel * 0.45), plain, np.array([186.0, 186, 192])))
    return parts


def fish(rng: np.random.Generator) -> list[Part]:
    body = colour(rng, (0.02, 0.16), (0.6, 0.95), (0.7, 0.98))
    height, tail = rng.uniform(0.5, 0.66), rng.uniform(0.42, 0.55)
    return [
        Part(polygon((0.5, 0), (1, -tail), (0.88, 0), (1, tail)), fibres, body * 0.8),
        Part(polygon((-0.25, -height * 0.75), (0.15, -height - 0.24), (0.4, -height * 0.6)), fibres, body * 0.8),
        Part(ellipse(-0.15, 0, 0.84, height), scales, body),
        Part(ellipse(-0.6, -0.12, 0.17, 0.17), plain, WHITE),
        Part(ellipse(-0.62, -0.12, 0.085, 0.085), plain, DARK),
    ]


def house(rng: np.random.Generator) -> list[Part]:
    wall = colour(rng, (0.98, 1.07), (0.4, 0.7), (0.55, 0.8))
    roof = colour(rng, (0.55, 0.72), (0.15, 0.45), (0.3, 0.5))
    width, height, door = rng.uniform(0.72, 0.86), rng.uniform(0.8, 0.95), rng.uniform(-0.5, 0)
    lit = np.array([250.0, 226, 124])
    return [
        Part(rectangle(-width, -0.15, width, height), bricks, wall),
        Part(polygon((-width - 0.14, -0.12), (0, -rng.uniform(0.85, 1)), (width + 0.14, -0.12)), tiles, roof),
        Part(rectangle(door - 0.16, height - 0.55, door + 0.16, height), plain, np.array([88.0, 58, 40])),
        Part(rectangle(door + 0.32, 0.12, door + 0.64, 0.44), plain, lit),
    ]


def mushroom(rng: np.random.Generator) -> list[Part]:
    cap = colour(rng, (0.9, 1.04), (0.7, 0.95), (0.6, 0.9))
    stalk = colour(rng, (0.08, 0.14), (0.06, 0.2), (0.84, 0.95))
    width = rng.uniform(0.32, 0.44)
    return [
        Part(polygon((-width, 0), (width, 0), (width * 1.25, 0.95), (-width * 1.25, 0.95)), fibres, stalk),
        Part(dome(0, 0.16, 0.98, rng.uniform(0.88, 1.08)), spots, cap),
    ]


def sheep(rng: np.random.Generator) -> list[Part]:
    fleece = colour(rng, (0.06, 0.14), (0.03, 0.22), (0.82, 1))
    skin = colour(rng, (0, 0.1), (0.1, 0.3), (0.16, 0.32))
    parts = [Part(rectangle(x, 0.3, x + 0.13, 0.92), plain, skin) for x in (-0.45, -0.2, 0.28, 0.52)]
    return [
        *parts,
        Part(cloud(rng, 0.08, 0, 0.78, rng.uniform(0.5, 0.6), 9), wool, fleece),
        Part(ellipse(-0.74, -0.2, 0.26, 0.22), plain, skin),
        Part(polygon((-0.62, -0.34), (-0.36, -0.42), (-0.5, -0.18)), plain, skin),
        Part(ellipse(-0.8, -0.25, 0.05, 0.05), plain, WHITE),
    ]


OBJECTS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    "boat": boat, "car": car, "fish": fish, "house": house, "mushroom": mushroom, "sheep": sheep,
}  # fmt: skip


def _draw_classes(rng: np.random.Generator) -> list[str]:
    """One to three different classes; boat and fish often together."""
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.38, 0.12]))
    classes = [str(name) for name in rng.choice(CLASSES, count, replace=False)]
    companion = COMPANIONS.get(classes[0])
    if count > 1 and companion and companion not in classes and rng.random() < 0.5:
        classes[1] = companion
    return classes


def draw_scene(rng: np.random.Generator, size: int = SIZE) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """Image u8[size,size,3] RGB, mask u8[size,size] (0 background, i + 1 = CLASSES[i]), tags, name of the background."""
    classes = _draw_classes(rng)
    home = HOME.get(classes[0])
    background = home if home and rng.random() < AT_HOME[classes[0]] else str(rng.choice(sorted(GROUNDS)))
    canvas = Canvas(size, ground(rng, size, background))
    circles: list[tuple[float, float, float]] = []  # x, y, radius px of the objects so far
    for name in classes:
        largest, smallest = ((0.46, 0.3), (0.35, 0.24), (0.3, 0.21))[len(classes) - 1]
        radius = rng.uniform(smallest, largest) * size
        centre = (size / 2, size / 2)
        for _ in range(12):  # objects may overlap, but none may be covered
            centre = (rng.uniform(radius * 0.75, size - radius * 0.75), rng.uniform(radius * 0.75, size - radius * 0.75))
            if all(math.hypot(centre[0] - x, centre[1] - y) > 0.85 * (radius + other) for x, y, other in circles):
                break
        circles.append((*centre, radius))
        canvas.paint(
            rng, OBJECTS[name](rng), centre=centre, radius=radius, turn=float(rng.normal() * 0.13),
            mirrored=bool(rng.random() < 0.5), value=CLASSES.index(name) + 1,
        )  # fmt: skip
    image, mask = canvas.finish(rng)
    visible = np.bincount(mask.ravel(), minlength=len(CLASSES) + 1)[1:]
    tags = tuple(name for name, count in zip(CLASSES, visible, strict=True) if count >= SMALLEST_VISIBLE)
    return image, mask, tags, background


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one image, so that images do not depend on the order in which they are drawn."""
    return np.random.default_rng([seed, ("train", "val").index(split), index])


def write(root: Path, *, seed: int, train: int, val: int) -> bool:
    """Draws images/, masks/ and tags.csv of so many images under root; False where the same data set is there already."""
    description = {"seed": seed, "train": train, "val": val, "size": SIZE}
    description_file = root / "scenes.json"
    if description_file.is_file() and json.loads(description_file.read_text(encoding="utf-8")) == description:
        return False
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for folder in ("images", "masks"):
        (partial / folder).mkdir(parents=True)
    with (partial / "tags.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["id", "tags", "split"])
        for split, count in (("train", train), ("val", val)):
            for index in range(count):
                image, mask, tags, _ = draw_scene(scene_rng(seed, split, index))
                name = f"{split}_{index:04d}"
                Image.fromarray(image).save(partial / "images" / f"{name}.png")
                Image.fromarray(mask).save(partial / "masks" / f"{name}.png")
                rows.writerow([name, " ".join(tags), split])
    (partial / "scenes.json").write_text(json.dumps(description) + "\n", encoding="utf-8")
    shutil.rmtree(root, ignore_errors=True)
    root.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(root)
    return True


@dataclass(frozen=True)
class Params:
    """dataset.options: none; seed and size are given when the set is drawn."""


class Dataset:
    """Reads the files that `write` has drawn: ids are file names without suffix."""

    def __init__(self, root: Path, params: Params) -> None:
        del params
        self.root = root
        self.labels = LabelSpace(CLASSES)

    def listings(self) -> list[Listing]:
        """Every row of tags.csv. DatasetError where it cannot be read."""
        rows = read_table(self.root / "tags.csv", ["id", "tags", "split"])
        return [
            Listing(row["id"], Path("images") / f"{row['id']}.png", row["split"], tags, True)
            for row, tags in zip(rows, split_tags(row["tags"] for row in rows), strict=True)
        ]

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values."""
        return read_mask(self.root / "masks" / f"{listing.id}.png")


@click.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True, help="Another seed is another data set.")
@click.option("--train", default=400, show_default=True, help="Images in split train.")
@click.option("--val", default=100, show_default=True, help="Images in split val.")
def main(root: Path, seed: int, train: int, val: int) -> None:
    """Draws the data set into ROOT; does nothing where the same one lies there already."""
    drawn = write(root, seed=seed, train=train, val=val)
    click.echo(f"{root}: {train} + {val} scenes {'drawn' if drawn else 'are there already'}")


if __name__ == "__main__":
    main()
