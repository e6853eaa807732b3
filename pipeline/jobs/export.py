"""Stage export: refined labels and corrected masks → pseudo-masks, 255 on uncertain pixels, and other formats of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.audit import empty_masks
from pipeline.core import plugins, store
from pipeline.core import records as records_file
from pipeline.core.contracts import CheckedExporter
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Export, Settings
from pipeline.corrections import Corrections, load_corrections
from pipeline.jobs.engine import Engine, parts_of, run_parts

PRODUCT = "hdf5"  # always written, as pseudo_masks/
PSEUDO_MASKS = "pseudo_masks"  # what evaluate calls the masks
EMPTY_SAMPLE = 1000  # masks that are looked at for classes without a pixel


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
    section = settings.shared(Export, "export")
    formats = exporters(section.formats)
    image_records = records_file.read(records)
    train = image_records.split("train")
    parts = parts_of(train, section.images_per_part)
    refined_store = store.Store(refined, store.REFINED)
    refined_store.require(train.ids)
    corrected_masks = load_corrections(corrections, image_records)
    digest = store.digest(dataclasses.asdict(section))
    input_digests = refined_store.logical_digest, store.file_digest(records), corrected_masks.digest
    key = store.digest([digest, engine.code_digest(), *input_digests])
    with store.Workspace(pseudo_masks, key) as work:
        job = Job(section, refined, corrected_masks, image_records.labels, len(parts), digest, work.result)
        run_parts(export_part, parts, job, out=work.result, engine=engine, what=f"export {settings.name}")
        write_corrected(job, image_records.by_id())
    with store.Workspace(exports, store.digest([key, "formats"])) as work:
        write_formats(pseudo_masks, image_records, formats, work.result)
    if (found := _empty_masks(pseudo_masks, image_records)) is not None:
        engine.warn("%s", empty_masks.warning(settings.name, found))


def _empty_masks(pseudo_masks: Path, records: Records) -> dict[str, Any] | None:
    """Whether most tagged classes have no pixel, by a sample of the masks: a million are not read once more."""
    masks_store = store.Store(pseudo_masks, store.PSEUDO_MASKS)
    table = np.zeros((len(records.labels), 2), np.int64)
    for record in records_file.sample(records.split("train"), EMPTY_SAMPLE):
        present = np.bincount(masks_store.read(record.id, "mask").ravel(), minlength=256)
        table += empty_masks.counts(record.tags or (), present, len(records.labels))
    return empty_masks.finding(table, records.labels.names, PSEUDO_MASKS)


def mask_of(refined: dict[str, np.ndarray], record: ImageRecord, labels: LabelSpace, settings: Export) -> np.ndarray:
    """u8[h,w] mask values: the refined label, IGNORE where its confidence is below ignore_below or two thresholds disagree.

    refined: label, confidence (0..255) and disagree, u8[h,w] each. ValueError where the label has a class beyond the tags.
    """
    mask = refined["label"].copy()
    tags = range(len(labels)) if record.tags is None else record.tags
    allowed = {BACKGROUND, *(tag + 1 for tag in tags)}
    unknown = [int(value) for value in np.unique(mask) if int(value) not in allowed]
    if unknown:
        names = ["background", *labels.names]
        text = ", ".join(names[value] if value < len(names) else str(value) for value in unknown)
        raise ValueError(f"{record.id!r}: refined labels hold {text}, which its tags do not name")
    mask[refined["confidence"] < settings.ignore_below * store.CONFIDENCE_STEPS] = IGNORE
    if settings.ignore_disagreement:
        mask[refined["disagree"] > 0] = IGNORE
    return mask


_STORES: dict[str, store.Store] = {}  # of this process: opening reads the index of every part


def export_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes a part of pseudo-masks, with corrected masks in place of pseudo-masks; returns its number of images."""
    part, records = item
    key = str(job.out.resolve())  # the workspace's name is a digest of all inputs
    if key not in _STORES:
        _STORES[key] = store.Store(job.refined, store.REFINED)
    refined = _STORES[key]

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
    """(id, u8[h,w] mask values) of a finished store, by id, read as they are asked for."""
    pseudo_masks = store.Store(folder, store.PSEUDO_MASKS)
    return ((image_id, pseudo_masks.read(image_id, "mask")) for image_id in pseudo_masks.ids)


def write_corrected(job: Job, by_id: Mapping[str, ImageRecord]) -> None:
    """Writes corrections.json beside the parts: per corrected image pixels, changed pixels and classes beyond its tags.

    Not written where no mask was corrected.
    """
    if not job.corrections.files:
        return
    refined = store.Store(job.refined, store.REFINED)
    rows = {}
    for image_id in sorted(job.corrections.files):
        record, mask = by_id[image_id], job.corrections.read(image_id)
        before = mask_of(refined[image_id], record, job.labels, job.settings)
        tags = range(len(job.labels)) if record.tags is None else record.tags
        beyond_tags = set(np.unique(mask).tolist()) - {BACKGROUND, IGNORE, *(tag + 1 for tag in tags)}
        rows[image_id] = {
            "pixels": int(mask.size),
            "changed": int((mask != before).sum()),
            "beyond_tags": [job.labels.names[value - 1] for value in sorted(beyond_tags)],
        }
    content = {"schema": "corrections", "version": 1, "corrected": len(rows), "images": rows}
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (job.out / store.CORRECTED).write_text(text + "\n", encoding="utf-8")


def exporters(formats: Sequence[str]) -> dict[str, ModuleType]:
    """Modules of the formats beside the product, by name. ValueError lists every problem."""
    modules: dict[str, ModuleType] = {}
    problems = [f"export format {name!r} stands twice" for name in sorted(set(formats)) if formats.count(name) > 1]
    for name in formats:
        if name == PRODUCT:
            continue
        try:
            modules[name] = plugins.load("exporters", name)
            if isinstance(modules[name], CheckedExporter):
                modules[name].check()
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return modules


def write_formats(pseudo_masks: Path, records: Records, formats: Mapping[str, ModuleType], out: Path) -> None:
    """Writes every format into folder out/<format>, and README.txt."""
    out.mkdir(parents=True, exist_ok=True)
    for name, module in formats.items():
        module.write(masks(pseudo_masks), records, out / name)
    names = ", ".join(formats) or "none"
    (out / "README.txt").write_text(
        f"Formats beside the HDF5 store in ../pseudo_masks: {names}. Name more in export.formats of params.yaml.\n",
        encoding="utf-8",
    )
