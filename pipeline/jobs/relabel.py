"""Images of split train + trained segmenter → what it sees in them, among the classes of their tags.

A segmenter averages out many errors of the masks that it was trained on, and tags strike out what cannot be there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.core import overlap, store
from pipeline.core import records as records_file
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Relabel, Settings
from pipeline.crf import CrfSettings, dense_crf, unary_from_probabilities
from pipeline.imaging import planes
from pipeline.jobs import segment, windows
from pipeline.jobs.engine import Engine, parts_of, run_parts
from pipeline.jobs.segment import Segmented

STRIDE = 4  # px of the image per cell of the probabilities that are kept


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable. segment: how the segmenter sees an image; its CRF is not used."""

    segment: segment.Job
    crf: CrfSettings | None

    @property
    def device(self) -> str:
        return self.segment.device


def run(settings: Settings, *, records: Path, segmenter: Path, relabelled: Path, engine: Engine) -> None:
    """Stage relabel. Where it is not enabled, the store has no images."""
    listed, chosen = records_file.read(records), settings.section(Relabel, "relabel")
    images = listed.split("train") if chosen.enabled else listed.split("train")[:0]
    device = engine.device()
    inner = segment.job_of(settings, segmenter, root=settings.root, labels=listed.labels, out=relabelled, device=device)
    digest = store.digest([inner.params_digest, dataclasses.asdict(chosen)])
    parts = parts_of(images, inner.settings.images_per_part)
    files = store.file_digest(records), store.file_digest(segmenter)
    with store.Workspace(relabelled, store.digest([digest, engine.code_digest(), *files])) as work:
        crf = crf_of(settings, chosen)
        inner = dataclasses.replace(
            inner, crf=None, parts=len(parts), params_digest=digest, out=work.result, loaders=engine.loaders(device),
            processes=engine.beside(device) if crf else 0,
        )  # fmt: skip
        job = Job(inner, crf)
        run_parts(relabel_part, parts, job, out=work.result, engine=engine, what=f"relabel {settings.name}")


def crf_of(settings: Settings, chosen: Relabel) -> CrfSettings | None:
    """relabel.crf, strictly parsed."""
    return None if chosen.crf is None else settings.part(CrfSettings, chosen.crf, "relabel.crf")


def relabel_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part; returns its number of images. Those without a class are background, at no cost."""
    (part, records), inner = item, job.segment
    model = segment.load(inner.segmenter, inner.weights.resolve(), inner.labels, inner.device, str(inner.out.resolve()))
    seen = [record for record in records if record.tags != ()]

    def write(segmented: Iterator[Segmented]) -> None:
        make = partial(_item, crf=job.crf, classes=len(inner.labels))
        with closing(segment.finished(segmented, make, inner.processes)) as items:
            all_items = (next(items) if record.tags != () else (record.id, background(record.size)) for record in records)
            store.write_part(
                store.part_path(inner.out, part), store.RELABELLED, all_items, labels=inner.labels, part=part,
                parts=inner.parts, params_digest=inner.params_digest, compression=inner.settings.compression,
            )  # fmt: skip

    overlap.behind(segment.segmented(seen, model, inner), write, 1 if inner.loaders else 0)
    return len(records)


def _item(result: Segmented, crf: CrfSettings | None, classes: int) -> store.Item:
    record, image, stack = result
    possible = np.arange(classes) if record.tags is None else np.array(record.tags, np.int64)
    return record.id, fields(image, stack, possible, crf)


def fields(image: np.ndarray, stack: np.ndarray, classes: np.ndarray, crf: CrfSettings | None) -> dict[str, np.ndarray]:
    """RELABELLED fields of an image u8[h,w,3] and the segmenter's probabilities f32[p,·,·]; classes: i64[k], those that can
    win, from 0."""
    size = (image.shape[0], image.shape[1])
    values = np.concatenate([[0], classes + 1])
    kept = stack[values]
    probabilities = kept / np.maximum(kept.sum(axis=0), np.finfo(np.float32).tiny)
    coarse = F.interpolate(torch.from_numpy(probabilities)[None], _grid(size), mode="area")[0].numpy()
    if crf is not None:
        unary = unary_from_probabilities(probabilities)
        probabilities = dense_crf(windows.resize(image, probabilities.shape[1:]), unary, crf)
    plane, confidence = planes.winners(probabilities, size)
    return {
        "classes": classes.astype(np.uint16),
        "probabilities": coarse.astype(np.float16),
        "label": values.astype(np.uint8)[plane],
        "confidence": np.round(confidence * store.CONFIDENCE_STEPS).astype(np.uint8),
    }


def background(size: tuple[int, int]) -> dict[str, np.ndarray]:
    """RELABELLED fields of an image of (h, w) px in which no class is."""
    return {
        "classes": np.zeros(0, np.uint16),
        "probabilities": np.ones((1, *_grid(size)), np.float16),
        "label": np.zeros(size, np.uint8),
        "confidence": np.full(size, store.CONFIDENCE_STEPS, np.uint8),
    }


def _grid(size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) px → (rows, columns) of the probabilities that are kept."""
    return -(-size[0] // STRIDE), -(-size[1] // STRIDE)
