"""records.h5 ↔ Records: images, sizes, splits and tags; image files → pixels.

Images are decoded here and nowhere else, so that every stage sees the same pixels: EXIF orientation applied to images (masks
are taken as upright); greyscale, palette, CMYK and 16-bit converted to 8-bit RGB; transparency composited over white.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image, ImageOps

from pipeline.core.labels import LabelSpace

SCHEMA = "records"
VERSION = 1
SPLITS = ("train", "val")


@dataclass(frozen=True)
class ImageRecord:
    """A usable image.

    path    of the image file, POSIX, relative to dataset.root
    size    (H, W) px of the upright image
    split   of SPLITS
    tags    class indices from 0, ascending; (): no class is present; None: untagged
    sha256  of the image file, 32 bytes
    """

    id: str
    path: str
    size: tuple[int, int]
    split: str
    tags: tuple[int, ...] | None
    sha256: bytes


@dataclass(frozen=True)
class Records:
    """All usable images by id, the label space, and (id, reason) of the images that prepare skipped."""

    labels: LabelSpace
    images: tuple[ImageRecord, ...]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.images)

    def split(self, name: str) -> tuple[ImageRecord, ...]:
        """Images of split `train` or `val`."""
        return tuple(record for record in self.images if record.split == name)

    def by_id(self) -> dict[str, ImageRecord]:
        """Image records by id, in id order."""
        return {record.id: record for record in self.images}


def shuffled(ids: Iterable[str]) -> list[str]:
    """Ids in the order of their sha256, a pseudo-random order that depends on nothing else."""
    return sorted(ids, key=lambda image_id: hashlib.sha256(image_id.encode("utf-8")).digest())


def sample(records: Iterable[ImageRecord], count: int) -> list[ImageRecord]:
    """A pseudo-random sample of at most `count` records, the same for the same ids; in id order."""
    by_id = {record.id: record for record in records}
    return [by_id[image_id] for image_id in sorted(shuffled(by_id)[:count])]


def decode(data: bytes) -> np.ndarray:
    """Bytes of an image file → u8[h,w,3] RGB, upright. OSError or ValueError where it is damaged or of an unknown format."""
    with Image.open(io.BytesIO(data)) as stored:
        stored.load()  # a truncated file fails here, not half-way through training
        image: Image.Image = ImageOps.exif_transpose(stored) or stored
        if image.mode.startswith("I"):  # 16-bit greyscale comes as I;16 or I: keep the high byte
            wide = np.asarray(image).astype(np.int64)
            image = Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range; save the image as 8 or 16 bit")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        return np.asarray(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """u8[h,w] stored values of a palette, 8-bit greyscale or 1-bit image. ValueError for any other mode."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mask {path.name} is a {image.mode} image; it must be palette or 8-bit greyscale")
        return np.asarray(image).astype(np.uint8)  # a 1-bit image reads as 0 and 1, which are background and the first class


class ChangedImageError(ValueError):
    """An image file is no longer what prepare has read."""


def read_image(record: ImageRecord, root: Path) -> np.ndarray:
    """u8[h,w,3] RGB, upright. ChangedImageError if the file has changed or gone since prepare; root: dataset.root."""
    path = root / record.path
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ChangedImageError(f"{path} is gone since prepare read it; put it back, or run `dvc repro`") from error
    if hashlib.sha256(data).digest() != record.sha256:
        raise ChangedImageError(
            f"{path} has changed since prepare read it; run `dvc repro`, which starts from prepare again"
        )
    return decode(data)


def file_stem(image_id: str) -> str:
    """An id as a file name, safe on every system: separators, control characters, a leading dot become %XX. Injective."""

    def safe(position: int, character: str) -> bool:
        return character.isprintable() and character not in '/\\:*?"<>|%' and not (character == "." and position == 0)

    return "".join(
        character if safe(position, character) else "".join(f"%{byte:02X}" for byte in character.encode("utf-8"))
        for position, character in enumerate(image_id)
    )


def write(path: Path, records: Records) -> None:
    """Records → HDF5 file (docs/data.md). Texts are fixed-width UTF-8: HDF5 does not compress variable-length types."""
    images = sorted(records.images, key=lambda record: record.id)
    tags = [record.tags or () for record in images]
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(partial, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"schema": SCHEMA, "version": VERSION})
        file["class_names"] = _texts(records.labels.names)
        file["ids"] = _texts([record.id for record in images])
        file["paths"] = _texts([record.path for record in images])
        file["size"] = np.array([record.size for record in images], np.uint32).reshape(-1, 2)
        file["split"] = np.array([SPLITS.index(record.split) for record in images], np.uint8)
        file["tagged"] = np.array([record.tags is not None for record in images], np.uint8)
        file["tags"] = np.array([tag for row in tags for tag in row], np.uint16)
        file["tags_offset"] = np.cumsum([0, *map(len, tags)]).astype(np.uint64)
        file["sha256"] = np.frombuffer(b"".join(record.sha256 for record in images), np.uint8).reshape(-1, 32)
        file["skipped_ids"] = _texts([image_id for image_id, _ in records.skipped])
        file["skipped_reasons"] = _texts([reason for _, reason in records.skipped])
    partial.replace(path)


def read(path: Path, only: Container[str] | None = None) -> Records:
    """HDF5 file → Records. ValueError if it is no records file of this version.

    only: None, or the ids of the images that are wanted: memory then grows by a few bytes for each of the others.
    """
    h5_file: Any = h5py.File(path, "r")  # h5py's stubs know neither groups nor data sets by name
    with h5_file as file:
        if file.attrs.get("schema") != SCHEMA or file.attrs.get("version") != VERSION:
            raise ValueError(f"{path} is no {SCHEMA} file of version {VERSION}; run `dvc repro prepare`")
        rows = [row for row, encoded in enumerate(file["ids"][()]) if only is None or encoded.decode("utf-8") in only]
        offset, tags = file["tags_offset"][()].astype(int), file["tags"][()]
        names = ("ids", "paths", "size", "split", "tagged", "sha256")
        columns = zip(rows, *(file[name][()][rows] for name in names), strict=True)
        images = tuple(
            ImageRecord(
                id=image_id.decode("utf-8"),
                path=image_path.decode("utf-8"),
                size=(int(size[0]), int(size[1])),
                split=SPLITS[split],
                tags=tuple(int(tag) for tag in tags[offset[row] : offset[row + 1]]) if tagged else None,
                sha256=sha256.tobytes(),
            )
            for row, image_id, image_path, size, split, tagged, sha256 in columns
        )
        skipped = tuple(zip(_strings(file["skipped_ids"]), _strings(file["skipped_reasons"]), strict=True))
        return Records(LabelSpace(tuple(_strings(file["class_names"]))), images, skipped)


def _texts(values: Sequence[str]) -> np.ndarray:
    encoded = [value.encode("utf-8") for value in values]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def _strings(dataset: Any) -> list[str]:
    return [value.decode("utf-8") for value in dataset[()]]
