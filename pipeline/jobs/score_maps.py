"""Images + model → score maps and how well their views agree, part by part; views of equally sized images share a batch."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core import config, overlap, plugins, store
from pipeline.core.contracts import ScoreMaps
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Extract
from pipeline.imaging import planes, scoremaps, transforms
from pipeline.training import checkpoint
from pipeline.training.precision import autocast
from pipeline.training.settings import Training

WRITER_QUEUE = 2  # batches that wait to be written: with less than one, the network would wait for the last one's writing


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable. model: the trained weights; backbone: name of the family in pipeline/nn."""

    method: str
    backbone: str
    model: Path
    settings: Extract
    options: Any  # the method's Options
    root: Path
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path
    device: str
    loaders: int = 0  # threads that decode images ahead of the network; with any, another one writes behind it


@lru_cache(maxsize=1)
def load(method: str, backbone: str, model: Path, device: str, run: str) -> Any:
    """The trained method, in eval mode on device; kept for as long as `run`, the work space, is the same.

    ValueError if the file is another method's.
    """
    del run
    metadata = checkpoint.read_metadata(model)
    if metadata["plugin"] != method:
        raise ValueError(f"{model} was trained as method {metadata['plugin']!r}, not {method!r}")
    module = plugins.load("methods", method)
    training = config.parse(Training, json.loads(metadata["section"]), "train", model)
    params = config.parse(module.Params, training.model, "train.model", model)
    built = module.Method(
        LabelSpace(tuple(json.loads(metadata["labels"]))), params, training.schedule, plugins.load("nn", backbone)
    )
    checkpoint.load_into(built, model)
    return built.to(device).eval()


def extract_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part of score maps; returns its number of images."""
    part, records = item
    method = load(job.method, job.backbone, job.model.resolve(), job.device, str(job.out.resolve()))

    def write(items: Iterator[store.Item]) -> None:
        store.write_part(
            store.part_path(job.out, part), store.SCORE_MAPS, items, labels=job.labels, part=part, parts=job.parts,
            params_digest=job.params_digest, compression=job.settings.compression,
        )  # fmt: skip

    queue = WRITER_QUEUE * images_per_batch(job.settings)
    overlap.behind(_items(records, method, job), write, queue if job.loaders else 0)
    return len(records)


def images_per_batch(settings: Extract) -> int:
    """At most; each has a view, or two with its mirror image, at every scale."""
    return max(1, settings.views_per_batch // (2 if settings.flip else 1))


def _items(records: Sequence[ImageRecord], method: Any, job: Job) -> Generator[store.Item, None, None]:
    """Score maps in id order. Batches hold equally sized images of this part, so they do not depend on the processes."""
    batch_size = images_per_batch(job.settings)
    batch_of = {record.id: batch for batch in alike(records, batch_size) for record in batch}
    due = (member for record in records if record == batch_of[record.id][0] for member in batch_of[record.id])
    ready: dict[str, dict[str, np.ndarray]] = {}  # bounded by the part, decoded masks and affinities too

    def views(record: ImageRecord) -> list[np.ndarray]:
        return views_of(read_image(record, job.root), method.stride, job.settings)

    with closing(overlap.ahead(views, due, job.loaders, batch_size + job.loaders)) as decoded:
        for record in records:
            if record.id not in ready:  # it is the first of its batch
                batch = batch_of[record.id]
                loaded = list(islice(decoded, len(batch)))
                scored = score_views(loaded, batch, method, job.options, job.settings, job.device)
                ready.update(zip((member.id for member in batch), scored, strict=True))
            yield record.id, ready.pop(record.id)


def alike(records: Sequence[ImageRecord], batch_size: int) -> Iterator[list[ImageRecord]]:
    """Batches of equally sized images, at most `batch_size`, each in the order of the records."""
    groups: dict[tuple[int, int], list[ImageRecord]] = {}
    for record in records:
        groups.setdefault(record.size, []).append(record)
    for group in groups.values():
        yield from (group[at : at + batch_size] for at in range(0, len(group), batch_size))


def views_of(image: np.ndarray, stride: int, settings: Extract) -> list[np.ndarray]:
    """Image u8[h,w,3] → u8[·,·,3] at every scale. stride: px of the image per cell of the network's map."""
    sizes = (transforms.view_size(image.shape[:2], scale, stride, settings.long_side) for scale in settings.scales)
    return [transforms.resize(image, size) for size in sizes]


def score(
    images: Sequence[np.ndarray],
    records: Sequence[ImageRecord],
    method: Any,
    options: Any,
    settings: Extract,
    device: str,
) -> list[dict[str, np.ndarray]]:
    """Equally sized images u8[h,w,3] → one set of SCORE_MAPS fields each."""
    views = [views_of(image, method.stride, settings) for image in images]
    return score_views(views, records, method, options, settings, device)


@torch.inference_mode()
def score_views(
    views: Sequence[Sequence[np.ndarray]],
    records: Sequence[ImageRecord],
    method: Any,
    options: Any,
    settings: Extract,
    device: str,
) -> list[dict[str, np.ndarray]]:
    """Views of equally sized images, as views_of makes them → one set of SCORE_MAPS fields per image.

    On train the classes of the tags are kept; on val, and where nobody tagged the image, those that the network finds.
    """
    h, w = records[0].size
    grid = -(-h // settings.stride), -(-w // settings.stride)
    maps: list[ScoreMaps] = []
    for of_scale in zip(*views, strict=True):
        batch = transforms.tensor_of(np.stack(of_scale), device)
        if settings.flip:
            batch = torch.cat([batch, batch.flip(-1)])
        with autocast(settings.precision, device):
            last = len(maps) + 1 == len(settings.scales)
            maps.append(method.score_maps(batch, options, keep_affinity=settings.keep_affinity and last))
    logits = torch.stack([_views(scale.tag_logits, len(views)) for scale in maps]).mean(dim=(0, 2)).float().cpu()  # [b,c]
    last_view = views[0][-1]  # of the scale whose affinity is kept
    cells = last_view.shape[0] // method.stride, last_view.shape[1] // method.stride
    return [_item(row, record, maps, logits[row], grid, cells, settings, len(views)) for row, record in enumerate(records)]


def _views(values: Tensor, images: int) -> Tensor:
    """[views * b, …] → [b, views, …]; the batch held all plain views first, then all mirrored ones."""
    return values.reshape(-1, images, *values.shape[1:]).transpose(0, 1)


def _item(
    row: int,
    record: ImageRecord,
    maps: Sequence[ScoreMaps],
    logits: Tensor,
    grid: tuple[int, int],
    cells: tuple[int, int],
    settings: Extract,
    images: int,
) -> dict[str, np.ndarray]:
    if record.split == "train" and record.tags is not None:
        classes = torch.tensor(record.tags, dtype=torch.long)
    else:
        classes = torch.nonzero(logits.sigmoid() >= settings.tag_threshold).flatten()
    views = [_views(scale.scores, images)[row][:, classes.to(scale.scores.device)].float() for scale in maps]
    merged = scoremaps.merge_views(views, rule=settings.merge, size=grid).cpu()
    affinity = maps[-1].affinity if settings.keep_affinity else None
    if settings.keep_affinity and affinity is None:
        raise ValueError("extract.keep_affinity is true, but this method has no affinity; set it to false in the recipe")
    return {
        "classes": classes.numpy().astype(np.uint16),
        "scores": merged.numpy().astype(np.float16),
        "agreement": scoremaps.view_agreement(views, rule=settings.merge, size=grid).cpu().numpy().astype(np.float16),
        "tag_logits": logits.numpy(),
        "affinity": np.zeros((0, 0), np.float16)
        if affinity is None
        else _views(affinity, images)[row][0].cpu().numpy().astype(np.float16),
        "grid": np.array((0, 0) if affinity is None else cells, np.uint16),
        "decoded": _decoded(row, record, maps, classes, grid, images),
    }


def _decoded(
    row: int, record: ImageRecord, maps: Sequence[ScoreMaps], classes: Tensor, grid: tuple[int, int], images: int
) -> np.ndarray:
    """u8[h,w] mask values of the method's own decoder: on train among background and the tags, else among all planes.

    Probabilities of all views are averaged on the grid of the score maps.
    """
    decoded = [scale.decoded for scale in maps if scale.decoded is not None]
    if not decoded:
        return np.zeros((0, 0), np.uint8)
    tagged = record.split == "train" and record.tags is not None
    planes_kept = F.pad(classes + 1, (1, 0)) if tagged else torch.arange(decoded[0].shape[1])
    views = [_views(scale, images)[row][:, planes_kept.to(scale.device)].float() for scale in decoded]
    probabilities = scoremaps.merge_views(views, rule="mean", size=grid).cpu().numpy()
    return planes_kept.numpy().astype(np.uint8)[planes.winners(probabilities, record.size)[0]]
