"""Pseudo-masks + records → folds, a segmenter trained without each of them, and how well it agrees with the masks it never
saw.

The score is cleanlab's for semantic segmentation (cleanlab.segmentation.rank.get_label_quality_scores, method "softmin"; Lad
and Mueller, Estimating label quality and errors in semantic segmentation data via any model, arXiv 2307.05080), written anew
and streamed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from pipeline import metrics
from pipeline.core import config, overlap, store
from pipeline.core import records as records_file
from pipeline.core.ids import Ids
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.record_table import RecordTable
from pipeline.core.records import ImageRecord, shuffled
from pipeline.core.sections import CrossValidate, Segment, Settings
from pipeline.imaging.planes import nearest
from pipeline.jobs import segment, train
from pipeline.jobs.engine import Engine, parts_of, run_parts
from pipeline.training import loop


@dataclass(frozen=True)
class Fold:
    """The images that are held out, in id order, and the training on all others."""

    number: int
    training: loop.Job
    held_out: Sequence[ImageRecord]


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable: how to segment with the fold's weights, and the masks to compare with."""

    segment: segment.Job
    masks: Path
    temperature: float

    @property
    def device(self) -> str:
        return self.segment.device


def run(settings: Settings, *, records: Path, pseudo_masks: Path, init: Path, held_out: Path, engine: Engine) -> None:
    """Stage cross_validate: one training per fold, and how its segmenter agrees with the fold's pseudo-masks.

    With folds 0 the store has no images.
    """
    chosen, segmentation = settings.section(CrossValidate, "cross_validate"), segment_settings(settings)
    labels = records_file.read(records).labels
    if not chosen.folds:
        write(held_out, (), labels, chosen)
        return
    all_images, metadata = train.job(settings, "segmenters", records=records, init=init, masks=pseudo_masks, engine=engine)
    folds = plan(all_images, chosen.folds, settings.file)
    digest = store.digest([dataclasses.asdict(chosen), dataclasses.asdict(segmentation)])
    device = engine.device()
    with store.Workspace(held_out, store.digest([all_images.work.name, digest])) as work:
        folders = []
        for fold in folds:
            weights = work.folder / f"fold-{fold.number}.safetensors"
            name = f"fold {fold.number + 1} of {settings.name}"
            if not weights.exists():
                train.train(
                    fold.training, metadata, model=weights, log=weights.with_suffix(".csv"), engine=engine,
                    what=f"train without {name}",
                )  # fmt: skip
            folder = weights.with_suffix("")
            parts = parts_of(fold.held_out, segmentation.images_per_part)
            inner = segment.Job(
                segmenter=settings.run.segmenter, weights=weights, settings=segmentation, crf=None,
                options=segment.options_of(settings, segmentation), root=settings.root, labels=labels, parts=len(parts),
                params_digest=digest, out=folder, device=device, loaders=engine.loaders(device),
            )  # fmt: skip
            job = Job(inner, pseudo_masks, chosen.temperature)
            run_parts(score_part, parts, job, out=folder, engine=engine, what=f"segment {name}")
            folders.append(folder)
        write(work.result / held_out.name, gathered(folders), labels, chosen)


def segment_settings(settings: Settings) -> Segment:
    """Section segment with one view, not mirrored, and no CRF: probabilities are needed, not edges."""
    return dataclasses.replace(settings.section(Segment, "segment"), scales=(1.0,), flip=False, crf=None)


def folds_of(ids: Iterable[str], folds: int) -> list[list[str]]:
    """`folds` disjoint lists of sorted ids that cover all; their sizes differ by one at most.

    The images' place in the order of the sha256 of their ids decides, so the order of the records does not matter.
    """
    ordered = shuffled(ids)
    return [sorted(ordered[first::folds]) for first in range(folds)]


def plan(all_images: loop.Job, folds: int, file: Path) -> list[Fold]:
    """One training per fold: `all_images`, which is retrain's own, without the fold's images.

    ParamsError for more folds than images.
    """
    table = RecordTable.of(all_images.images.records)
    if folds > len(table):
        raise config.ParamsError(
            f"{file}: cross_validate.folds: got {folds}, allowed is 0 (off) or 2 up to the number of images with a "
            f"pseudo-mask, "
            f"{len(table)} (edit {file})"
        )
    return [
        Fold(number, train.without(all_images, held_out), table.among(Ids.of(held_out)))
        for number, held_out in enumerate(folds_of(table.ids, folds))
    ]


def soft_min(probabilities: np.ndarray, temperature: float) -> float:
    """f[n] in 0..1, the probabilities of the given labels → Σ s · softmax((1 - s) / temperature), in 0..1; NaN for none.

    The softmax is over pixels: as the temperature falls, the mean turns into that of the least believed pixel.
    """
    if not probabilities.size:
        return float("nan")
    values = probabilities.astype(np.float64)
    weights = np.exp((values.min() - values) / temperature)  # the greatest exponent is 0
    return float((values * weights).sum() / weights.sum())


def compare(probabilities: np.ndarray, mask: np.ndarray, temperature: float) -> dict[str, np.ndarray]:
    """Probabilities f32[p,h',w'] and mask u8[h,w] → HELD_OUT fields. Pixels of 255 do not count; NaN where all are 255.

    Both are compared on the probabilities' canvas, which is the image's size unless that is huge: a mask is
    brought there by its nearest pixels, which costs p times less than enlarging the probabilities.
    """
    labels = nearest(mask, (probabilities.shape[1], probabilities.shape[2]))
    known = labels != IGNORE
    counts = metrics.confusion(labels, probabilities.argmax(axis=0).astype(np.uint8), len(probabilities))
    of_labels = np.take_along_axis(probabilities, np.where(known, labels, 0)[None].astype(np.intp), 0)[0][known]
    return {
        "soft_min": np.array([soft_min(of_labels, temperature)], np.float32),
        "held_out_agreement": np.array([metrics.miou(counts, protocol="background")], np.float32),
    }


@lru_cache(maxsize=1)
def _masks(folder: Path, run: str) -> store.Store:
    """Opened once per process, for as long as `run`, the work space, is the same."""
    del run
    return store.Store(folder, store.PSEUDO_MASKS)


def score_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Segments some held-out images and writes how they compare with their masks; returns their number."""
    part, records = item
    inner, run = job.segment, str(job.segment.out.resolve())
    masks = _masks(job.masks.resolve(), run)
    model = segment.load(inner.segmenter, inner.weights.resolve(), inner.labels, inner.device, run)

    def write_compared(segmented: Iterator[tuple[ImageRecord, np.ndarray, np.ndarray]]) -> None:
        items = (
            (record.id, compare(stack, masks.read(record.id, "mask"), job.temperature)) for record, _, stack in segmented
        )
        store.write_part(
            store.part_path(inner.out, part), store.HELD_OUT, items, labels=inner.labels, part=part, parts=inner.parts,
            params_digest=inner.params_digest, compression="none",
        )  # fmt: skip

    overlap.behind(segment.segmented(records, model, inner), write_compared, 1 if inner.loaders else 0)
    return len(records)


def gathered(folders: Iterable[Path]) -> Iterator[store.Item]:
    """What the folds found, in id order: two numbers an image."""
    items = {image_id: values for folder in folders for image_id, values in store.Store(folder, store.HELD_OUT)}
    return iter(sorted(items.items()))


def write(path: Path, items: Iterable[store.Item], labels: LabelSpace, chosen: CrossValidate) -> None:
    """held_out.h5; without items a store of no images."""
    store.write_part(
        path, store.HELD_OUT, items, labels=labels, part=0, parts=1,
        params_digest=store.digest(dataclasses.asdict(chosen)), compression="gzip",
    )  # fmt: skip
