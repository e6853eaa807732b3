"""Refined labels, and masks that a person mended → pseudo-masks with 255 where they cannot be trusted, and other formats of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from pipeline.core import plugins, store
from pipeline.core import records as records_file
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Export, Settings
from pipeline.corrections import Corrections
from pipeline.corrections import find as find_corrections
from pipeline.jobs.engine import Engine, parts_of, run_parts

PRODUCT = "hdf5"  # always written, as pseudo_masks/


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable."""

    settings: Export
    refined: Path
    corrections: Corrections
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path


def run(
    settings: Settings, *, records: Path, refined: Path, corrections: Path, pseudo_masks: Path, exports: Path, engine: Engine
) -> None:
    """Stage export: the pseudo-masks of split train, and other formats of them."""
    chosen = settings.shared(Export, "export")
    formats = exporters(chosen.formats)
    listed = records_file.read(records)
    parts = parts_of(listed.split("train"), chosen.images_per_part)
    labels = store.Store(refined, store.REFINED)
    labels.require(record.id for part in parts for record in part)
    corrected = find_corrections(corrections, listed)
    digest = store.digest(dataclasses.asdict(chosen))
    files = labels.logical_digest, store.file_digest(records), corrected.digest
    key = store.digest([digest, engine.code_digest(), *files])
    with store.Workspace(pseudo_masks, key) as work:
        job = Job(chosen, refined, corrected, listed.labels, len(parts), digest, work.result)
        run_parts(export_part, parts, job, out=work.result, engine=engine, what=f"export {settings.name}")
        write_corrected(job, {record.id: record for part in parts for record in part})
    with store.Workspace(exports, store.digest([key, "formats"])) as work:
        write_formats(pseudo_masks, listed, formats, work.result)


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
    """Writes one part of pseudo-masks, corrected ones where there are some; returns its number of images."""
    part, records = item
    key = str(job.out.resolve())  # the work space's name stands for all inputs
    if key not in _OPENED:
        _OPENED[key] = store.Store(job.refined, store.REFINED)
    refined = _OPENED[key]

    def mask(record: ImageRecord) -> np.ndarray:
        if record.id in job.corrections.files:
            return job.corrections.read(record.id)
        return mask_of(refined[record.id], record, job.labels, job.settings)

    items = ((record.id, {"mask": mask(record)}) for record in records)
    store.write_part(
        store.part_path(job.out, part), store.PSEUDO_MASKS, items, labels=job.labels, part=part, parts=job.parts,
        params_digest=job.params_digest, compression=job.settings.compression,
    )  # fmt: skip
    return len(records)


def masks(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(id, mask) of a finished store, in id order, one at a time."""
    found = store.Store(folder, store.PSEUDO_MASKS)
    return ((image_id, found.read(image_id, "mask")) for image_id in found.ids)


def write_corrected(job: Job, by_id: Mapping[str, ImageRecord]) -> None:
    """corrections.json beside the parts: per corrected image its pixels, how many the person changed, classes beyond its tags.

    Not written where nothing was corrected, so that such pseudo-masks are the same bytes as ever.
    """
    if not job.corrections.files:
        return
    refined = store.Store(job.refined, store.REFINED)
    rows = {}
    for image_id in sorted(job.corrections.files):
        record, mask = by_id[image_id], job.corrections.read(image_id)
        before = mask_of(refined[image_id], record, job.labels, job.settings)
        beyond = (
            ()
            if record.tags is None
            else set(np.unique(mask).tolist()) - {BACKGROUND, IGNORE, *(t + 1 for t in record.tags)}
        )
        rows[image_id] = {
            "pixels": int(mask.size),
            "changed": int((mask != before).sum()),
            "beyond_tags": [job.labels.names[value - 1] for value in sorted(beyond)],
        }
    told = {"schema": "corrections", "version": 1, "corrected": len(rows), "images": rows}
    text = json.dumps(told, indent=1, ensure_ascii=False)
    (job.out / store.CORRECTED).write_text(text + "\n", encoding="utf-8")


def exporters(formats: Sequence[str]) -> dict[str, ModuleType]:
    """The formats asked for beside the product → their modules. ValueError lists all that is wrong with them."""
    found: dict[str, ModuleType] = {}
    problems = [f"export format {name!r} stands twice" for name in sorted(set(formats)) if formats.count(name) > 1]
    for name in formats:
        if name == PRODUCT:
            continue
        try:
            found[name] = plugins.load("exporters", name)
            getattr(found[name], "check", lambda: None)()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return found


def write_formats(pseudo_masks: Path, records: Records, formats: Mapping[str, ModuleType], out: Path) -> None:
    """Every other format that params.yaml names, each in a folder of its own."""
    out.mkdir(parents=True, exist_ok=True)
    for name, module in formats.items():
        module.write(masks(pseudo_masks), records, out / name)
    told = ", ".join(formats) or "none"
    (out / "README.txt").write_text(
        f"Formats beside the HDF5 store in ../pseudo_masks: {told}. Name more in export.formats of params.yaml.\n",
        encoding="utf-8",
    )
