"""records.h5 ↔ ImageRecord: which images there are, their tags, and how each one is read.

Images are decoded here and nowhere else, so that every stage sees the same pixels: EXIF orientation applied
(masks are taken as already upright), greyscale, palette, CMYK and 16-bit turned into 8-bit RGB, transparency laid over white.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
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
    """One usable image. path is relative to dataset.root; size is (H, W) px upright; tags are sorted class positions."""

    id: str
    path: str
    size: tuple[int, int]
    split: str
    tags: tuple[int, ...] | None
    sha256: bytes


@dataclass(frozen=True)
class Records:
    """All usable images sorted by id, the label space, and what prepare skipped as (id, reason)."""

    labels: LabelSpace
    images: tuple[ImageRecord, ...]
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.images)

    def split(self, name: str) -> tuple[ImageRecord, ...]:
        return tuple(record for record in self.images if record.split == name)

    def by_id(self) -> dict[str, ImageRecord]:
        return {record.id: record for record in self.images}


def shuffled(ids: Iterable[str]) -> list[str]:
    """Ids in the order of their sha256: as good as random, and the same wherever the same ids are given."""
    return sorted(ids, key=lambda image_id: hashlib.sha256(image_id.encode("utf-8")).digest())


def sample(records: Iterable[ImageRecord], count: int) -> list[ImageRecord]:
    """At most `count` of them, the first of `shuffled`, in id order."""
    by_id = {record.id: record for record in records}
    return [by_id[image_id] for image_id in sorted(shuffled(by_id)[:count])]


def decode(data: bytes) -> np.ndarray:
    """An image file's bytes → u8[h,w,3] RGB, upright. OSError or ValueError where it cannot be read whole."""
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()  # a truncated file fails here, not half-way through training
        image: Image.Image = ImageOps.exif_transpose(opened) or opened
        if image.mode.startswith("I"):  # 16-bit greyscale comes as I;16 or I: keep the high byte
            wide = np.asarray(image).astype(np.int64)
            image = Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range; save the image as 8 or 16 bit")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            clear = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", clear.size, (255, 255, 255, 255)), clear)
        return np.asarray(image.convert("RGB"))


def read_mask(path: Path) -> np.ndarray:
    """u8[h,w] values of a palette or 8-bit greyscale image. ValueError for any other kind: colours are no class numbers."""
    with Image.open(path) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mask {path.name} is a {image.mode} image; it must be palette or 8-bit greyscale")
        return np.asarray(image).astype(np.uint8)  # a 1-bit image reads as 0 and 1, which are background and the first class


def read_image(record: ImageRecord, root: Path) -> np.ndarray:
    """u8[h,w,3] RGB of a record. RuntimeError if the file is no longer the one that prepare saw."""
    data = (root / record.path).read_bytes()
    if hashlib.sha256(data).digest() != record.sha256:
        raise RuntimeError(f"{root / record.path} has changed since prepare read it; run `dvc repro` from prepare on")
    return decode(data)


def file_stem(image_id: str) -> str:
    """An id as a file name that is safe on every system: separators, controls and leading dots become %XX, one to one."""

    def safe(position: int, character: str) -> bool:
        return character.isprintable() and character not in '/\\:*?"<>|%' and not (character == "." and position == 0)

    return "".join(
        character if safe(position, character) else "".join(f"%{byte:02X}" for byte in character.encode("utf-8"))
        for position, character in enumerate(image_id)
    )


def write(path: Path, records: Records) -> None:
    """Records → one HDF5 file. Texts are fixed-width UTF-8, since HDF5 does not compress variable-length types."""
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


def read(path: Path) -> Records:
    """One HDF5 file → Records. ValueError if it is no records file of this version."""
    opened: Any = h5py.File(path, "r")  # h5py's types know neither groups nor data sets by name
    with opened as file:
        if file.attrs.get("schema") != SCHEMA or file.attrs.get("version") != VERSION:
            raise ValueError(f"{path} is no {SCHEMA} file of version {VERSION}; run `dvc repro prepare`")
        offset, tags = file["tags_offset"][()].astype(int), file["tags"][()]
        columns = zip(
            _strings(file["ids"]), _strings(file["paths"]), file["size"][()], file["split"][()], file["tagged"][()],
            file["sha256"][()], strict=True,
        )  # fmt: skip
        images = tuple(
            ImageRecord(
                id=image_id,
                path=image_path,
                size=(int(size[0]), int(size[1])),
                split=SPLITS[split],
                tags=tuple(int(tag) for tag in tags[offset[row] : offset[row + 1]]) if tagged else None,
                sha256=sha256.tobytes(),
            )
            for row, (image_id, image_path, size, split, tagged, sha256) in enumerate(columns)
        )
        skipped = tuple(zip(_strings(file["skipped_ids"]), _strings(file["skipped_reasons"]), strict=True))
        return Records(LabelSpace(tuple(_strings(file["class_names"]))), images, skipped)


def _texts(values: Sequence[str]) -> np.ndarray:
    encoded = [value.encode("utf-8") for value in values]
    return np.array(encoded, dtype=f"S{max([1, *map(len, encoded)])}")


def _strings(dataset: Any) -> list[str]:
    return [value.decode("utf-8") for value in dataset[()]]
