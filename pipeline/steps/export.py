"""Refined labels → pseudo-masks with 255 where they cannot be trusted, and other formats of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core import plugins, store
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Export

PRODUCT = "hdf5"  # always written, as pseudo_masks/


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable."""

    settings: Export
    refined: Path
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path


def mask_of(refined: dict[str, np.ndarray], record: ImageRecord, labels: LabelSpace, settings: Export) -> np.ndarray:
    """u8[h,w]: the refined label; 255 where its confidence is below ignore_below, or where two background levels disagree.

    ValueError if a class outside the image's tags appears: no refiner may invent one.
    """
    mask = refined["label"].copy()
    tags = range(len(labels)) if record.tags is None else record.tags
    allowed = {BACKGROUND, *(tag + 1 for tag in tags)}
    strange = [int(value) for value in np.unique(mask) if int(value) not in allowed]
    if strange:
        names = ["background", *labels.names]
        told = ", ".join(names[value] if value < len(names) else str(value) for value in strange)
        raise ValueError(f"{record.id!r}: refined labels hold {told}, which its tags do not name")
    mask[refined["confidence"] < settings.ignore_below * store.CONFIDENCE_STEPS] = IGNORE
    if settings.ignore_disagreement:
        mask[refined["disagree"] > 0] = IGNORE
    return mask


_OPENED: dict[str, store.Store] = {}  # one per process; opening reads the index of every part


def export_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part of pseudo-masks; returns its number of images."""
    part, records = item
    key = str(job.out.resolve())  # the work space's name stands for all inputs
    if key not in _OPENED:
        _OPENED[key] = store.Store(job.refined, store.REFINED)
    refined = _OPENED[key]
    items = ((record.id, {"mask": mask_of(refined[record.id], record, job.labels, job.settings)}) for record in records)
    store.write_part(
        store.part_path(job.out, part), store.PSEUDO_MASKS, items, labels=job.labels, part=part, parts=job.parts,
        params_digest=job.params_digest, compression=job.settings.compression,
    )  # fmt: skip
    return len(records)


def masks(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(id, mask) of a finished store, in id order, one at a time."""
    found = store.Store(folder, store.PSEUDO_MASKS)
    return ((image_id, found.read(image_id, "mask")) for image_id in found.ids)


def write_formats(pseudo_masks: Path, labels: LabelSpace, formats: Sequence[str], out: Path) -> None:
    """Every other format that params.yaml names, each in a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    asked = [name for name in formats if name != PRODUCT]
    for name in asked:
        plugins.load("exporters", name).write(masks(pseudo_masks), labels, out / name)
    told = ", ".join(asked) or "none"
    (out / "README.txt").write_text(
        f"Formats beside the HDF5 store in ../pseudo_masks: {told}. Name more in export.<method>.formats of params.yaml.\n",
        encoding="utf-8",
    )
