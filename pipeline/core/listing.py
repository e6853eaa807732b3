"""What data sets share: tag lists, mask files, and one error that names all offenders."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
SHOWN = 20


class DatasetError(ValueError):
    """The raw data are not usable; the text lists the first offenders and how many there are."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f"\n… and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        super().__init__(f"{len(problems)} problems in the data set:\n" + "\n".join(problems[:SHOWN]) + more)
        self.problems = list(problems)


def id_problem(image_id: str) -> str | None:
    """Why an id cannot be used, or None. Ids are relative paths without suffix; they never leave their folder."""
    path = PurePosixPath(image_id)
    if not image_id or "\0" in image_id:
        return f"{image_id!r}: an id must not be empty or hold a null character"
    if path.is_absolute() or ".." in path.parts or "\\" in image_id:
        return f"{image_id!r}: an id must be a relative path without `..` or backslashes"
    return None


def read_table(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a CSV with a header, UTF-8 (a byte-order mark is fine). DatasetError if a needed column is missing."""
    if not path.is_file():
        raise DatasetError([f"{path} is missing"])
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError([f"{path}: column {name!r} is missing; the header is {reader.fieldnames}" for name in missing])
            return [{key: (value or "").strip() for key, value in row.items() if key is not None} for row in reader]
    except UnicodeDecodeError as error:
        raise DatasetError([f"{path} is not UTF-8 ({error}); save it as UTF-8"]) from error


def split_tags(cells: Iterable[str]) -> list[tuple[str, ...]]:
    """Tag cells of one column → tags per row. Tags are separated by `;` if any cell holds one (names may then have spaces),
    else by spaces. An empty cell means: looked at, and nothing is there."""
    cells = list(cells)
    separator = ";" if any(";" in cell for cell in cells) else None
    return [tuple(dict.fromkeys(tag.strip() for tag in cell.split(separator) if tag.strip())) for cell in cells]


def without_suffix(name: str) -> str:
    """`a/b.jpg` → `a/b`; a suffix that is no image's stays, so `scan.v2` is an id."""
    return name[: -len(PurePosixPath(name).suffix)] if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else name


def twice(values: Iterable[str]) -> list[str]:
    """Values that come more than once, sorted."""
    seen: set[str] = set()
    return sorted({value for value in values if value in seen or seen.add(value)})


def val_by_hash(image_id: str, share: float) -> str:
    """Split of an image by its id alone: the same on every host, and unmoved when images are added."""
    number = int.from_bytes(hashlib.sha256(image_id.encode("utf-8")).digest()[:8], "big")
    return "val" if number < share * 2**64 else "train"


def read_mask(path: Path) -> np.ndarray:
    """u8[h,w] values of a palette or 8-bit greyscale image. ValueError for any other kind: colours are no class numbers."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mask {path.name} is a {image.mode} image; it must be palette or 8-bit greyscale")
        return np.asarray(image.convert("L") if image.mode == "1" else image).copy()


def images_under(folder: Path) -> list[Path]:
    """Image files at any depth, relative to folder, sorted. DatasetError if there is no such folder."""
    if not folder.is_dir():
        raise DatasetError([f"folder {folder} is missing"])
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
