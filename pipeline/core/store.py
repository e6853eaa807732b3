"""Arrays per image ↔ a folder of HDF5 parts, by which stages exchange results.

A part holds `ids` and a group per field with `data` (flat, 1-D), `shape u4[n,rank]` and `offset u8[n+1]`: the array of image
i is data[offset[i]:offset[i+1]] in row-major order of shape[i]. Borders of parts depend on the sorted ids and
`images_per_part` alone, so that bytes do not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.core.ids import Ids
from pipeline.core.labels import LabelSpace
from pipeline.core.part_writer import CHUNK_BYTES
from pipeline.core.part_writer import write_part as write_part
from pipeline.core.schemas import CORRECTED as CORRECTED
from pipeline.core.schemas import GALLERY as GALLERY
from pipeline.core.schemas import HELD_OUT as HELD_OUT
from pipeline.core.schemas import INSPECTION as INSPECTION
from pipeline.core.schemas import PREDICTIONS as PREDICTIONS
from pipeline.core.schemas import PSEUDO_MASKS as PSEUDO_MASKS
from pipeline.core.schemas import REFINED as REFINED
from pipeline.core.schemas import RELABELLED as RELABELLED
from pipeline.core.schemas import SCORE_MAPS as SCORE_MAPS
from pipeline.core.schemas import SMALL_MASKS as SMALL_MASKS
from pipeline.core.schemas import TRUTH as TRUTH
from pipeline.core.schemas import Field as Field
from pipeline.core.schemas import Item as Item
from pipeline.core.schemas import Schema as Schema
from pipeline.core.schemas import StoreError as StoreError
from pipeline.core.schemas import empty as empty

MAX_OPEN_PARTS = 2  # files that a store keeps open
CONFIDENCE_STEPS = 255  # confidences are stored as u8: value / 255


def parts_of(ids: Iterable[str], images_per_part: int) -> list[list[str]]:
    """Sorted ids in parts of `images_per_part`; without ids a single empty part, so that an out is never an empty folder."""
    ordered = sorted(ids)
    return [ordered[start : start + images_per_part] for start in range(0, len(ordered), images_per_part)] or [[]]


def part_path(folder: Path, part: int) -> Path:
    """File of a part, counted from 0."""
    return folder / f"part-{part:05d}.h5"


class _Part:
    """An open part: its file, its ids and, as they are asked for, the tables (shape, offset) of its fields."""

    def __init__(self, path: Path) -> None:
        try:
            self.file: Any = h5py.File(path, "r", rdcc_nbytes=2 * CHUNK_BYTES)
        except OSError as error:
            raise StoreError(f"{path} cannot be opened ({error}); run the stage that writes it (`dvc repro`)") from error
        self.ids = Ids(self.file["ids"][()])
        self._tables: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def table(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Shapes u4[n,rank] and offsets u8[n+1] of a field."""
        if name not in self._tables:
            self._tables[name] = self.file[name]["shape"][()], self.file[name]["offset"][()]
        return self._tables[name]


class Store:
    """Reads a folder of parts, or a single part. `store[id]` → arrays by field; iteration gives items (id, arrays) by id.

    ids are sorted; labels is the label space; logical_digest depends on ids, shapes and values, not on compression. Opening
    looks at names of files and at the first part alone: a worker opens the parts that it reads, which it finds by their
    first ids; `ids`, `logical_digest`, `require` and len() look at all parts. Threads may share a store.
    StoreError where a part is missing, damaged or of another schema.
    """

    def __init__(self, folder: Path, schema: Schema) -> None:
        self.folder, self.schema = Path(folder), schema
        self.paths = [self.folder] if self.folder.is_file() else sorted(self.folder.glob("part-*.h5"))
        if not self.paths:
            raise StoreError(f"{self.folder} holds no parts; run the stage that writes it (`dvc repro`)")
        self._forget()
        with self._lock:
            names = self._part(0).file["class_names"][()]
        self.labels = LabelSpace(tuple(name.decode("utf-8") for name in names))

    def _forget(self) -> None:
        """Nothing is open, nothing known of any part."""
        self._lock = threading.RLock()  # closing a part while another thread reads from it would crash HDF5
        self._process = os.getpid()
        self._open: dict[int, _Part] = {}
        self._checked = bytearray(len(self.paths))
        self._first: dict[int, bytes] = {}
        self._scanned: tuple[Ids, list[int], str] | None = None

    def _part(self, number: int) -> _Part:
        """An open part, checked at its first use. The caller holds the lock, and lets the part go before it does."""
        if os.getpid() != self._process:  # HDF5 handles do not survive a fork
            self._forget()
        if number not in self._open:
            if len(self._open) >= MAX_OPEN_PARTS:  # memory must not grow with the number of parts
                self._open.pop(next(iter(self._open))).file.close()
            part = _Part(self.paths[number])
            if not self._checked[number]:
                self._check_part(self.paths[number], part.file, number)
                self._checked[number] = 1
            self._open[number] = part
        return self._open[number]

    def _check_part(self, path: Path, file: Any, part: int) -> None:
        check_part(path, file, self.schema)
        if file.attrs["part"] != part or file.attrs["parts"] != len(self.paths):
            missing = sorted(
                set(range(int(file.attrs["parts"]))) - {int(path.stem[5:]) for path in self.folder.glob("part-*.h5")}
            )
            raise StoreError(f"{self.folder}: of {file.attrs['parts']} parts these are missing: {missing}")

    def _first_id(self, number: int) -> bytes:
        if number not in self._first:
            part = self._part(number)
            self._first[number] = bytes(part.ids.encoded[0]) if len(part.ids) else b""
        return self._first[number]

    def _place(self, image_id: str) -> tuple[int, int] | None:
        """(part, row) of an id, None where there is none. The caller holds the lock."""
        if self._scanned is not None:
            ids, starts, _ = self._scanned
            row = ids.find(image_id)
            if row is None:
                return None
            number = bisect_right(starts, row) - 1
            return number, row - starts[number]
        encoded = image_id.encode("utf-8", "surrogatepass")
        number = max(0, bisect_right(range(len(self.paths)), encoded, key=self._first_id) - 1)
        row = self._part(number).ids.find(image_id)
        return None if row is None else (number, row)

    def _all(self) -> tuple[Ids, list[int], str]:
        """Ids of all parts, the row at which each part begins, and the logical digest; all parts are checked."""
        with self._lock:
            if self._scanned is None:
                arrays, starts, digests = [], [], []
                for number, path in enumerate(self.paths):
                    part = self._part(number)
                    if arrays and len(part.ids) and len(arrays[-1]) and part.ids.encoded[0] <= arrays[-1][-1]:
                        raise StoreError(f"{path}: its ids do not follow those of the part before; run its stage again")
                    starts.append(sum(map(len, arrays[-1:])) + (starts[-1] if starts else 0))
                    arrays.append(part.ids.encoded)
                    digests.append(part.file.attrs["logical_digest"])
                digest = hashlib.sha256("".join(digests).encode()).hexdigest()
                self._scanned = Ids(np.concatenate(arrays)), starts, digest
            return self._scanned

    @property
    def ids(self) -> Ids:
        return self._all()[0]

    @property
    def logical_digest(self) -> str:
        return self._all()[2]

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, image_id: str) -> bool:
        with self._lock:
            return self._place(image_id) is not None

    def __iter__(self) -> Iterator[Item]:
        return ((image_id, self[image_id]) for image_id in self.ids)

    def __getitem__(self, image_id: str) -> dict[str, np.ndarray]:
        return {name: self.read(image_id, name) for name in self.schema.fields}

    def _known(self, image_id: str) -> tuple[int, int]:
        place = self._place(image_id)
        if place is None:
            raise StoreError(f"{self.folder} holds no id {image_id!r}")
        return place

    def read(self, image_id: str, name: str) -> np.ndarray:
        """A field of an image. StoreError if the id is unknown or the data are damaged."""
        with self._lock:
            number, row = self._known(image_id)
            part = self._part(number)
            shapes, offsets = part.table(name)
            try:
                flat = part.file[name]["data"][int(offsets[row]) : int(offsets[row + 1])]
            except OSError as error:  # the checksum of a chunk is wrong
                raise StoreError(f"{self.paths[number]}: {image_id!r} {name} is damaged ({error})") from error
            return flat.reshape(shapes[row].astype(int))

    def column(self, name: str) -> dict[str, np.ndarray]:
        """A field of all images, by id; for small fields."""
        arrays = {}
        for number in range(len(self.paths)):
            with self._lock:
                part = self._part(number)
                shapes, offsets = (values.astype(int) for values in part.table(name))
                data = part.file[name]["data"][()]
                ids = part.ids
            arrays |= {
                image_id: data[offsets[row] : offsets[row + 1]].reshape(shapes[row]) for row, image_id in enumerate(ids)
            }
        return arrays

    def shape_of(self, image_id: str, name: str) -> tuple[int, ...]:
        """Shape of a field of an image, without reading it."""
        with self._lock:
            number, row = self._known(image_id)
            return tuple(int(side) for side in self._part(number).table(name)[0][row])

    def require(self, ids: Iterable[str]) -> None:
        """StoreError unless the store holds exactly these ids."""
        expected, own = Ids.of(ids), self.ids
        if own == expected:
            return
        missing, extra = sorted(set(expected) - set(own)), sorted(set(own) - set(expected))
        if missing or extra:
            raise StoreError(
                f"{self.folder}: {len(missing)} ids are missing {missing[:5]}, {len(extra)} are not expected {extra[:5]}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "schema": self.schema, "paths": self.paths, "labels": self.labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def stream(path: Path, schema: Schema, block: int = 1024) -> Iterator[Item]:
    """Items of a store that is a single part, in id order, `block` images in memory at a time, no index of ids.

    StoreError where the part is missing, damaged or of another schema.
    """
    if not path.is_file():
        raise StoreError(f"{path} is missing; run the stage that writes it (`dvc repro`)")
    h5_file: Any = h5py.File(path, "r", rdcc_nbytes=2 * CHUNK_BYTES)
    with h5_file as file:
        check_part(path, file, schema)
        ids = file["ids"]
        for start in range(0, len(ids), block):
            end = min(start + block, len(ids))
            columns = {name: _block(path, file[name], start, end) for name in schema.fields}
            for row, image_id in enumerate(ids[start:end]):
                yield image_id.decode("utf-8"), {name: arrays[row] for name, arrays in columns.items()}


def _block(path: Path, group: Any, start: int, end: int) -> list[np.ndarray]:
    shapes, offsets = group["shape"][start:end].astype(int), group["offset"][start : end + 1].astype(int)
    try:
        flat = group["data"][offsets[0] : offsets[-1]]
    except OSError as error:  # the checksum of a chunk is wrong
        raise StoreError(f"{path}: {group.name} is damaged ({error})") from error
    parts = np.split(flat, offsets[1:-1] - offsets[0])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def check_part(path: Path, file: Any, schema: Schema) -> None:
    """StoreError where an open part is of another schema or version."""
    expected = (schema.name, schema.version)
    actual = (file.attrs.get("schema"), file.attrs.get("version"))
    if actual != expected:
        raise StoreError(f"{path}: schema {actual[0]} version {actual[1]}, expected {expected[0]} version {expected[1]}")


def digest(value: Any) -> str:
    """sha256 of the JSON of plain values (numbers, strings, lists, mappings with sorted keys); other values by str()."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, streamed."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Workspace:
    """`with Workspace(out, key) as work:` gives a folder for unfinished work, which survives a crash.

    key is a digest of inputs, params and code of the stage: the same key continues in the same folder. When the block ends
    without an error, `work.result` (for an out with a suffix, its file of the same name) replaces `out` by a rename, and the
    rest is removed.
    """

    def __init__(self, out: Path, key: str, root: Path = Path(".work")) -> None:
        self.out = out
        self.folder = root / key[:32]
        self.result = self.folder / "result"

    def __enter__(self) -> Workspace:
        self.result.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        if kind is not None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        if self.out.is_dir() and not self.out.is_symlink():
            shutil.rmtree(self.out)
        else:
            self.out.unlink(missing_ok=True)
        for partial in self.result.rglob("*.partial"):  # of writers that were killed
            partial.unlink()
        if self.out.suffix:  # an out that is a file has the same name inside the workspace
            (self.result / self.out.name).replace(self.out)
        else:
            self.result.replace(self.out)
        shutil.rmtree(self.folder, ignore_errors=True)


def missing_parts(folder: Path, parts: Sequence[Any]) -> list[int]:
    """Numbers of the parts that are not written yet, ascending."""
    return [part for part in range(len(parts)) if not part_path(folder, part).exists()]
