"""Pseudo-masks → data/train-00000-of-00001.parquet for Hugging Face's `datasets`: id, file, tags, mask as a PNG. Lossless.

Needs pyarrow: pip install tag2mask[parquet]. The mask is a palette PNG: an image to `datasets`, mask values to NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core.records import Records, file_stem
from pipeline.mask_files import legend, legend_lines, palette_png

MAX_ROWS, MAX_BYTES = 100, 2**24  # of a row group, which ends at whichever comes first; the Hub's viewer needs small ones


def check() -> None:
    """ValueError, before any training, where pyarrow is missing."""
    if find_spec("pyarrow") is None:
        raise ValueError(
            "export format hf_parquet needs pyarrow: pip install 'tag2mask[parquet]' (or pip install pyarrow), "
            "or take hf_parquet out of export.formats (edit params.yaml)"
        )


def features(records: Records) -> dict[str, Any]:
    """The columns as features of `datasets`."""
    names = {"names": list(records.labels.names), "_type": "ClassLabel"}
    return {
        "image_id": {"dtype": "string", "_type": "Value"},
        "file_name": {"dtype": "string", "_type": "Value"},
        "tags": {"feature": names, "_type": "Sequence"},
        "mask": {"_type": "Image"},
    }


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Streams row groups. file_name is relative to dataset.root; tags are class indices from 0, null on untagged images."""
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "image_id": text,
            "file_name": text,
            "tags": pyarrow.list_(pyarrow.int64()),
            "mask": pyarrow.struct({"bytes": pyarrow.binary(), "path": text}),
        },
        metadata={
            "huggingface": json.dumps({"info": {"features": features(records)}}),
            "tag2mask": json.dumps({"mask_values": legend(records.labels)}),
        },
    )
    by_id = records.by_id()
    (out / "data").mkdir(parents=True, exist_ok=True)
    with parquet.ParquetWriter(out / "data" / "train-00000-of-00001.parquet", schema, compression="zstd") as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for image_id, mask in masks:
            record, png = by_id[image_id], palette_png(mask)
            tags = None if record.tags is None else list(record.tags)
            image = {"bytes": png, "path": f"{file_stem(image_id)}.png"}
            rows.append({"image_id": image_id, "file_name": record.path, "tags": tags, "mask": image})
            size += len(png)
            if len(rows) == MAX_ROWS or size >= MAX_BYTES:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
    (out / "classes.txt").write_text(legend_lines(records.labels), encoding="utf-8")
