"""Images + segmenter → predictions: sliding windows over several scales and mirror images, then perhaps a CRF.

Shape letters: p planes (background and c classes), h w pixels of the image or view at hand, v views.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core import config, overlap, plugins, store
from pipeline.core import records as records_file
from pipeline.core.labels import LabelSpace
from pipeline.core.processes import pool_of
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Segment, Settings
from pipeline.crf import CrfSettings, dense_crf, unary_from_probabilities
from pipeline.imaging import planes, transforms
from pipeline.jobs import windows
from pipeline.jobs.engine import Engine, parts_of, run_parts
from pipeline.training import checkpoint
from pipeline.training.precision import autocast
from pipeline.training.settings import Training

Segmented = tuple[ImageRecord, np.ndarray, np.ndarray]  # record, image u8[h,w,3], probabilities f32[p,·,·]


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable. segmenter: the plug-in's and its family's name; weights: what retrain wrote."""

    segmenter: str
    weights: Path
    settings: Segment
    crf: CrfSettings | None
    options: Any  # the segmenter's Options
    root: Path
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path
    device: str
    loaders: int = 0  # threads that decode images ahead of the network; with any, another one writes behind it
    processes: int = 0  # that compute CRFs beside a GPU's; 0: the one that writes does


def run(settings: Settings, *, records: Path, segmenter: Path, predictions: Path, engine: Engine) -> None:
    """Stage segment: predictions on split val; tags are not used."""
    listed = records_file.read(records)
    job = job_of(settings, segmenter, root=settings.root, labels=listed.labels, out=predictions, device=engine.device())
    parts = parts_of(listed.split("val"), job.settings.images_per_part)
    files = store.file_digest(records), store.file_digest(segmenter)
    with store.Workspace(predictions, store.digest([job.params_digest, engine.code_digest(), *files])) as work:
        job = dataclasses.replace(job, parts=len(parts), out=work.result, loaders=engine.loaders(job.device))
        job = dataclasses.replace(job, processes=engine.beside(job.device) if job.crf else 0)
        run_parts(segment_part, parts, job, out=work.result, engine=engine, what=f"segment {settings.name}")


def job_of(settings: Settings, weights: Path, *, root: Path, labels: LabelSpace, out: Path, device: str) -> Job:
    """How to segment images under `root`. ValueError if `weights` are not of the run's segmenter and these classes."""
    segmentation, name = settings.section(Segment, "segment"), settings.run.segmenter
    training_of(name, weights, labels)
    return Job(
        segmenter=name, weights=weights, settings=segmentation, crf=crf_of(settings, segmentation),
        options=options_of(settings, segmentation), root=root, labels=labels, parts=0,
        params_digest=store.digest(dataclasses.asdict(segmentation)), out=out, device=device,
    )  # fmt: skip


def crf_of(settings: Settings, segmentation: Segment) -> CrfSettings | None:
    """segment.crf, strictly parsed."""
    return None if segmentation.crf is None else settings.part(CrfSettings, segmentation.crf, "segment.crf")


def options_of(settings: Settings, segmentation: Segment) -> Any:
    """segment.options as the segmenter's Options."""
    module = plugins.load("segmenters", settings.run.segmenter)
    return settings.part(module.Options, segmentation.options, "segment.options")


def training_of(name: str, weights: Path, labels: LabelSpace) -> tuple[Training, Any]:
    """How `weights` were trained: section retrain and the segmenter's Params, from the file's metadata.

    ValueError if the file belongs to another segmenter or to other classes than `labels`.
    """
    metadata = checkpoint.read_metadata(weights)
    if metadata["plugin"] != name:
        raise ValueError(f"{weights} was trained as segmenter {metadata['plugin']!r}, not {name!r}; run retrain again")
    classes = tuple(json.loads(metadata["labels"]))
    if classes != labels.names:
        raise ValueError(
            f"{weights} knows {', '.join(classes)}, records.h5 has {', '.join(labels.names)}; run retrain again"
        )
    plugins.load("nn", name)  # imported here, so that the stage's digest of code has the family in it
    training = config.parse(Training, json.loads(metadata["section"]), "retrain", weights)
    return training, config.parse(plugins.load("segmenters", name).Params, training.model, "retrain.model", weights)


@lru_cache(maxsize=1)
def load(name: str, weights: Path, labels: LabelSpace, device: str, run: str) -> Any:
    """The trained segmenter, in eval mode on device; kept for as long as `run`, the work space, is the same."""
    del run
    training, params = training_of(name, weights, labels)
    built = plugins.load("segmenters", name).Segmenter(labels, params, training.schedule, plugins.load("nn", name))
    checkpoint.load_into(built, weights)
    return built.to(device).eval()


def segment_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part of predictions; returns its number of images."""
    part, records = item
    model = load(job.segmenter, job.weights.resolve(), job.labels, job.device, str(job.out.resolve()))

    def write(segmented: Iterator[Segmented]) -> None:
        with closing(finished(segmented, partial(_item, crf=job.crf), job.processes)) as items:
            store.write_part(
                store.part_path(job.out, part), store.PREDICTIONS, items, labels=job.labels, part=part, parts=job.parts,
                params_digest=job.params_digest, compression=job.settings.compression,
            )  # fmt: skip

    overlap.behind(segmented(records, model, job), write, 1 if job.loaders else 0)  # stacks of planes are large
    return len(records)


def segmented(records: Sequence[ImageRecord], model: Any, job: Job) -> Generator[Segmented, None, None]:
    """Every record, its image u8[h,w,3] and its probabilities f32[p,·,·]; images are decoded by job.loaders threads."""
    planes_count = len(job.labels) + 1

    def load_views(record: ImageRecord) -> tuple[np.ndarray, Iterable[windows.View]]:
        image = read_image(record, job.root)
        views = windows.views(image, job.settings, planes_count)
        return image, list(views) if job.loaders else views  # in line, a view is alive at a time

    with closing(overlap.ahead(load_views, records, job.loaders, job.loaders)) as loaded:
        for record, (image, views) in zip(records, loaded, strict=True):
            yield record, image, mean_softmax(views, image.shape[:2], model, job, planes_count=planes_count)


def finished(
    results: Iterator[Segmented], make: Callable[[Segmented], store.Item], processes: int
) -> Generator[store.Item, None, None]:
    """Items that `make` makes. A CRF holds Python's lock from its start to its end, so that a network in another thread of
    the process would wait for it: beside a GPU it runs in `processes` of its own."""
    if processes == 0:
        yield from map(make, results)
        return
    with pool_of(processes) as pool:
        yield from overlap.through(pool, make, results, processes)


def _item(result: Segmented, crf: CrfSettings | None) -> store.Item:
    record, image, stack = result
    return record.id, fields(image, stack, crf)


def segment_one(image: np.ndarray, model: Any, job: Job) -> dict[str, np.ndarray]:
    """PREDICTIONS fields of one image u8[h,w,3]."""
    return fields(image, probabilities(image, model, job, planes_count=len(job.labels) + 1), job.crf)


def fields(image: np.ndarray, stack: np.ndarray, crf: CrfSettings | None) -> dict[str, np.ndarray]:
    """Image u8[h,w,3] and its probabilities f32[p,·,·] → label u8[h,w] of mask values, confidence u8[h,w]."""
    if crf is not None:
        stack = _refined(windows.resize(image, stack.shape[1:]), stack, crf)
    label, confidence = planes.winners(stack, image.shape[:2])
    return {"label": label, "confidence": np.round(confidence * store.CONFIDENCE_STEPS).astype(np.uint8)}


def _refined(image: np.ndarray, probabilities: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """u8[h,w,3], f32[p,h,w] → f32[p,h,w]: CRF over the planes that win somewhere (WeakTr section 2.4), 0 for the others."""
    present = np.unique(probabilities.argmax(axis=0))
    out = np.zeros_like(probabilities)
    out[present] = dense_crf(image, unary_from_probabilities(probabilities[present]), settings)
    return out


def probabilities(image: np.ndarray, model: Any, job: Job, *, planes_count: int) -> np.ndarray:
    """u8[h,w,3] → f32[p,h,w], the mean of the softmax over all scales and mirror images."""
    views = windows.views(image, job.settings, planes_count)
    return mean_softmax(views, image.shape[:2], model, job, planes_count=planes_count)


@torch.inference_mode()
def mean_softmax(
    views: Iterable[windows.View], size: tuple[int, ...], model: Any, job: Job, *, planes_count: int
) -> np.ndarray:
    """Views of an image of `size` (h, w) px → f32[p,h,w], the mean of the softmax over all of them.

    Huge images come back on a smaller canvas (bounded). A logit is averaged before the softmax only where windows overlap.
    """
    h, w = size
    canvas = windows.bounded((h, w), planes_count)
    total: Tensor | None = None
    for pixels, mirrorings in views:
        view = transforms.tensor_of(pixels, job.device)
        for mirrored in mirrorings:
            share = _share(view, mirrored, model, job, canvas)
            total = share if total is None else total.add_(share)
            del share  # a stack of planes that the next view would find still there
    assert total is not None  # Segment has at least one scale
    return total.div_(windows.view_count(job.settings)).cpu().numpy()


def _share(view: Tensor, mirrored: bool, model: Any, job: Job, canvas: tuple[int, int]) -> Tensor:
    """f32[3,h,w] → softmax f32[p,*canvas] of the view, or of its mirror image turned back."""
    logits = windowed(view.flip(-1) if mirrored else view, model, job)
    logits = logits.flip(-1) if mirrored else logits
    if logits.shape[-2:] != canvas:
        logits = F.interpolate(logits[None], canvas, mode="bilinear", align_corners=False)[0]
    return logits.softmax(dim=0)


def windowed(view: Tensor, model: Any, job: Job) -> Tensor:
    """f32[3,h,w] → logits f32[p,h,w], averaged where windows overlap; one batch of windows is alive at a time.

    A segmenter pads a window to its stride.
    """
    (h, w), settings = view.shape[-2:], job.settings
    total, count = None, view.new_zeros(h, w)
    for corners in windows.batches((h, w), settings):
        batch = torch.stack([view[:, rows, columns] for rows, columns in corners])
        with autocast(settings.precision, job.device):
            logits = model.segment(batch, job.options).float()
        if total is None:
            total = view.new_zeros(logits.shape[1], h, w)
        for (rows, columns), window in zip(corners, logits, strict=True):
            total[:, rows, columns] += window
            count[rows, columns] += 1
    assert total is not None  # there is at least one window
    return total.div_(count)
