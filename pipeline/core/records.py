"""records.h5 ↔ Records: images, sizes, splits and tags; image files → pixels.

Images are decoded here and nowhere else, so that every stage sees the same pixels: EXIF orientation applied to images (masks
are taken as upright); greyscale, palette, CMYK and 16-bit converted to 8-bit RGB; transparency composited over white.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import h5py
import numpy as np
from PIL import Image, ImageOps

from pipeline.core.ids import Ids, encode
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import ImageRecord, RecordsById, RecordTable, is_among, tags_of

SCHEMA = "records"
VERSION = 1
COLUMNS = ("ids", "paths", "size", "split", "tagged")  # of records.h5, in the order in which they are written
SHARDED = ("offset", "length")
BLOCK = 1 << 16  # rows that are read at a time where few are wanted


@dataclass(frozen=True)
class Records:
    """All usable images by id, the label space, and (id, reason) of the images that prepare skipped.

    images: any records; they become a table.
    """

    labels: LabelSpace
    images: Sequence[ImageRecord]
    skipped: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", RecordTable.of(self.images))

    @property
    def table(self) -> RecordTable:
        """The images; a worker is sent slices of it."""
        return RecordTable.of(self.images)

    @property
    def ids(self) -> Ids:
        return self.table.ids

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[ImageRecord]:
        return iter(self.images)

    def split(self, name: str) -> RecordTable:
        """Images of split `train` or `val`."""
        return self.table.of_split(name)

    def by_id(self) -> Mapping[str, ImageRecord]:
        """Image records by id, in id order."""
        return RecordsById(self.table)


def shuffled(ids: Iterable[str]) -> list[str]:
    """Ids in the order of their sha256, a pseudo-random order that depends on nothing else."""
    return sorted(ids, key=lambda image_id: hashlib.sha256(image_id.encode("utf-8")).digest())


def sample(records: Iterable[ImageRecord], count: int) -> list[ImageRecord]:
    """A pseudo-random sample of at most `count` records, the same for the same ids; in id order."""
    table = RecordTable.of(records)
    encoded = table.ids.encoded
    rows = heapq.nsmallest(count, range(len(table)), key=lambda row: hashlib.sha256(encoded[row]).digest())
    return [table[row] for row in sorted(rows)]


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
    return mask_of(path.read_bytes(), path.name)


def mask_of(data: bytes, name: str) -> np.ndarray:
    """Bytes of a mask file → its values, as read_mask. name: for errors."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"mask {name} is a {image.mode} image; it must be palette or 8-bit greyscale")
        return np.asarray(image).astype(np.uint8)  # a 1-bit image reads as 0 and 1, which are background and the first class


class ImageFile(Protocol):
    """An ImageRecord or a Listing: path relative to dataset.root; offset and length of an image in a shard."""

    @property
    def path(self) -> str | Path: ...
    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int | None: ...


class ChangedImageError(ValueError):
    """An image file is no longer what prepare has read."""


def shard_of(path: PurePosixPath) -> PurePosixPath:
    """`a/train-0.tar/x.jpg` → `a/train-0.tar`, the file that holds the image."""
    return next(folder for folder in reversed([path, *path.parents]) if folder.suffix == ".tar")


def read_bytes(path: Path, offset: int, length: int) -> bytes:
    """A piece of a file, by one read."""
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(length)


def read_file(file: ImageFile, root: Path) -> bytes:
    """An image file, of its own or in a shard. OSError where it cannot be read; root: dataset.root."""
    if file.length is None:
        return (root / file.path).read_bytes()
    return read_bytes(root / shard_of(PurePosixPath(file.path)), file.offset, file.length)


def read_image(record: ImageRecord, root: Path) -> np.ndarray:
    """u8[h,w,3] RGB, upright. ChangedImageError if the file has changed or gone since prepare; root: dataset.root."""
    path = root / record.path
    try:
        data = read_file(record, root)
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
    """Records → HDF5 file (docs/data.md). Texts are fixed-width UTF-8: HDF5 does not compress variable-length types.

    `offset` and `length` are written only where images lie in shards.
    """
    table = records.table
    partial = path.with_name(path.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(partial, "w", libver=("v110", "v110")) as file:
        file.attrs.update({"schema": SCHEMA, "version": VERSION})
        file["class_names"] = encode(records.labels.names)
        for name in COLUMNS:
            file[name] = table.columns[name]
        file["tags"], file["tags_offset"] = table.tags, table.tags_offset.astype(np.uint64)
        file["sha256"] = table.columns["sha256"]
        for name in (name for name in SHARDED if name in table.columns):
            file[name] = table.columns[name]
        file["skipped_ids"] = encode([image_id for image_id, _ in records.skipped])
        file["skipped_reasons"] = encode([reason for _, reason in records.skipped])
    partial.replace(path)


def read(path: Path, only: Collection[str] | None = None) -> Records:
    """HDF5 file → Records. ValueError if it is no records file of this version.

    only: None, or the ids of the images that are wanted: memory then grows by a few bytes for each of the others.
    """
    h5_file: Any = h5py.File(path, "r")  # h5py's stubs know neither groups nor data sets by name
    with h5_file as file:
        if file.attrs.get("schema") != SCHEMA or file.attrs.get("version") != VERSION:
            raise ValueError(f"{path} is no {SCHEMA} file of version {VERSION}; run `dvc repro prepare`")
        names = [name for name in (*COLUMNS, "sha256", *SHARDED) if name in file]
        tags, offset = file["tags"][()], file["tags_offset"][()].astype(np.int64)
        if only is None:
            table = RecordTable({name: file[name][()] for name in names}, tags, offset)
        else:
            rows = _rows(file["ids"], Ids.of(only))
            table = RecordTable({name: _at(file[name], rows) for name in names}, *tags_of(rows, tags, offset))
        skipped = tuple(zip(_strings(file["skipped_ids"]), _strings(file["skipped_reasons"]), strict=True))
        labels = LabelSpace(tuple(_strings(file["class_names"])))
    return Records(labels, table, skipped)


def _rows(ids: Any, wanted: Ids) -> np.ndarray:
    """Rows of a data set of ids, ascending, that hold an id that is wanted; a block in memory at a time."""
    blocks = (is_among(ids[start : start + BLOCK], wanted) for start in range(0, len(ids), BLOCK))
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *blocks]))


def _at(dataset: Any, rows: np.ndarray) -> np.ndarray:
    """Values of a data set at these rows, ascending numbers; a block in memory at a time."""
    borders = range(0, len(dataset), BLOCK)
    cuts = np.searchsorted(rows, [*borders, len(dataset)])
    blocks = (
        dataset[start : start + BLOCK][rows[first:last] - start]
        for start, first, last in zip(borders, cuts, cuts[1:], strict=False)
        if last > first
    )
    return np.concatenate([dataset[:0], *blocks])


def _strings(dataset: Any) -> list[str]:
    return [value.decode("utf-8") for value in dataset[()]]
