"""Segments as SAM's automatic mask generator writes them, and the files that hold them, for the tests of refiner
segments."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco


def masks_of(rng: np.random.Generator, size: tuple[int, int], count: int) -> list[np.ndarray]:
    """bool[h,w] each: noise of all densities, with empty and full ones among them."""
    return [rng.random(size) < density for density in rng.choice([0.0, 0.05, 0.5, 0.95, 1.0], count)]


def rle(mask: np.ndarray, **more: Any) -> dict[str, Any]:
    """A segment as SAM's automatic mask generator writes it with output_mode coco_rle."""
    packed = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    told = {
        "area": int(mask.sum()),
        "predicted_iou": 0.9,
        "stability_score": 0.95,
        "bbox": [0, 0, 1, 1],
        "crop_box": [0, 0, 9, 9],
    }
    return told | {"segmentation": {"size": list(mask.shape), "counts": packed["counts"].decode("ascii")}} | more


def plain_rle(packed: dict[str, Any]) -> dict[str, Any]:
    """The same without compression (output_mode uncompressed_rle), pixel by pixel."""
    counts, inside = [0], False
    for pixel in coco.decode(packed).T.ravel():
        if pixel != inside:
            counts.append(0)
            inside = not inside
        counts[-1] += 1
    return packed | {"counts": counts}


def write_lines(path: Path, images: dict[str, Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """A JSON Lines file, and the `segments` section that names it."""
    lines = (json.dumps({"id": one, "annotations": list(listed)}) for one, listed in images.items())
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return section(path)


def write_folder(folder: Path, images: dict[str, Any]) -> dict[str, Any]:
    for one, listed in images.items():
        path = folder / f"{one}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(listed), encoding="utf-8")
    return section(folder)


def section(path: Path) -> dict[str, Any]:
    """With the digest that the documented commands print."""
    if path.is_dir():
        command = r"find . -name '*.json' ! -name '.*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
        told = subprocess.run(["bash", "-c", command], cwd=path, capture_output=True, text=True, check=True).stdout
    else:
        told = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout
    return {"source": "file", "path": str(path), "sha256": told.split()[0]}
