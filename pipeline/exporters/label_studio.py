"""Pseudo-masks → tasks.json of Label Studio, one brush region per class and image, and its labelling interface. Lossless.

255 is the label `ignore`. Regions are predictions, which annotators accept or correct.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import numpy as np

from pipeline.core.records import Records
from pipeline.mask_files import BrushTag, brush_regions, hex_of, legend

ROOT = "/data/local-files/?d="  # Label Studio's own address of files under LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT


def write(masks: Iterator[tuple[str, np.ndarray]], records: Records, out: Path) -> None:
    """Streams task by task. data.image is the URL at which Label Studio serves the path under dataset.root."""
    out.mkdir(parents=True, exist_ok=True)
    by_id, names = records.by_id(), legend(records.labels)
    tag = BrushTag("tag", "image", names)
    with (out / "tasks.json").open("w", encoding="utf-8", newline="\n") as file:
        file.write("[")
        for number, (image_id, mask) in enumerate(masks, 1):
            task = {
                "data": {"image": ROOT + quote(by_id[image_id].path), "tag2mask_id": image_id},
                "predictions": [{"model_version": "tag2mask", "result": brush_regions(mask, tag, f"{number}")}],
            }
            file.write(("\n" if number == 1 else ",\n") + json.dumps(task))
        file.write("\n]\n")
    rows = [
        f"    <Label value={quoteattr(names[value])} background={quoteattr(hex_of(value))}/>" for value in names if value
    ]
    (out / "labels.xml").write_text(
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="tag" toName="image">\n'
        + "\n".join(rows)
        + "\n  </BrushLabels>\n</View>\n",
        encoding="utf-8",
    )
