"""Arrays per image, streamed → a part of a store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.schemas import Field, Item, Schema, StoreError

CHUNK_BYTES = 256 * 1024
LIBVER = ("v110", "v110")


def write_part(
    path: Path,
    schema: Schema,
    items: Iterable[Item],
    *,
    labels: LabelSpace,
    part: int,
    parts: int,
    params_digest: str,
    compression: str,
) -> None:
    """Streams items (id, arrays by field) into a part; items come sorted by id. The file appears only when it is complete.

    part, parts    number of this part, from 0, and of all
    params_digest  sha256 of the params that the arrays depend on, an attribute of the file
    compression    "gzip", "zstd" (needs hdf5plugin) or "none"

    StoreError on wrong fields, shapes or order. Arrays are cast to the field's dtype.
    """
    # of this process alone: a part whose worker seems lost may be written by two
    partial = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    ids: list[bytes] = []
    with h5py.File(partial, "w", libver=LIBVER) as file:
        writers = {name: _FieldWriter(file, name, field, compression) for name, field in schema.fields.items()}
        previous = None
        for image_id, arrays in items:
            if previous is not None and image_id <= previous:
                raise StoreError(f"{path}: id {image_id!r} comes after {previous!r}; ids must be sorted and unique")
            previous = image_id
            _check(image_id, arrays, schema, path)
            digest.update(image_id.encode("utf-8") + b"\0")
            for name, writer in writers.items():
                writer.append(arrays[name], digest)
            ids.append(image_id.encode("utf-8"))
        for writer in writers.values():
            writer.close()
        file["ids"] = np.array(ids, dtype=f"S{max([1, *map(len, ids)])}")
        file["class_names"] = np.array([name.encode("utf-8") for name in labels.names])
        values = {"part": part, "parts": parts, "params_digest": params_digest, "logical_digest": digest.hexdigest()}
        file.attrs.update(
            {"schema": schema.name, "version": schema.version, "background": BACKGROUND, "ignore": IGNORE, **values}
        )
    partial.replace(path)


class _FieldWriter:
    """Appends to a field of a part; holds at most a chunk and an image in memory."""

    def __init__(self, file: h5py.File, name: str, field: Field, compression: str) -> None:
        self.dtype = np.dtype(field.dtype)
        self.group = file.create_group(name)
        self.group.attrs["axes"] = " ".join(field.axes)
        chunk = CHUNK_BYTES // self.dtype.itemsize
        self.data = self.group.create_dataset(
            "data", (0,), self.dtype, maxshape=(None,), chunks=(chunk,), fletcher32=True, **_filter(compression)
        )
        self.chunk = chunk
        self.pending: list[np.ndarray] = []
        self.waiting = 0
        self.written = 0
        self.rank = len(field.axes)
        self.shapes: list[tuple[int, ...]] = []

    def append(self, array: np.ndarray, digest: Any) -> None:
        flat = np.ascontiguousarray(array, self.dtype).reshape(-1)
        digest.update(json.dumps(array.shape).encode() + flat.tobytes())
        self.shapes.append(array.shape)
        self.pending.append(flat)
        self.waiting += flat.size
        if self.waiting >= self.chunk:  # only whole chunks, so that none is compressed twice
            self._flush(self.waiting // self.chunk * self.chunk)

    def _flush(self, count: int) -> None:
        flat = np.concatenate(self.pending) if self.pending else np.empty(0, self.dtype)
        self.data.resize((self.written + count,))
        self.data[self.written :] = flat[:count]
        self.written += count
        self.pending, self.waiting = [flat[count:].copy()], flat.size - count

    def close(self) -> None:
        self._flush(self.waiting)
        shapes = np.array(self.shapes, "<u4").reshape(-1, self.rank)
        self.group["shape"] = shapes
        self.group["offset"] = np.concatenate([[0], np.cumsum(shapes.astype("<u8").prod(axis=1))]).astype("<u8")


def _filter(compression: str) -> dict[str, Any]:
    if compression == "none":
        return {}
    if compression == "gzip":
        return {"compression": "gzip", "compression_opts": 4, "shuffle": False}
    if compression == "zstd":
        try:
            import hdf5plugin  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise StoreError(
                "compression zstd needs `pip install hdf5plugin`, or set it to gzip in the recipe or params.yaml"
            ) from None
        return dict(hdf5plugin.Zstd(clevel=6))
    raise StoreError(f"compression {compression!r}: allowed are gzip, zstd, none (edit the recipe or params.yaml)")


def _check(image_id: str, arrays: Mapping[str, np.ndarray], schema: Schema, path: Path) -> None:
    if set(arrays) != set(schema.fields):
        raise StoreError(f"{path}: {image_id!r} has fields {sorted(arrays)}, {schema.name} has {sorted(schema.fields)}")
    lengths: dict[str, int] = {}
    for name, field in schema.fields.items():
        shape = arrays[name].shape
        if len(shape) != len(field.axes):
            raise StoreError(f"{path}: {image_id!r} {name} has shape {shape}, expected axes {field.axes}")
        for axis, length in zip(field.axes, shape, strict=True):
            if lengths.setdefault(axis, length) != length:
                raise StoreError(f"{path}: {image_id!r} {name} has {length} along {axis}, another field {lengths[axis]}")
