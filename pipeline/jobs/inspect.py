"""A trained method + images → pictures of its inner maps, its weights by layer and head, and what it suppresses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.core import overlap, store
from pipeline.core.contracts import Surroundings, WithSurroundings
from pipeline.core.record_table import RecordTable
from pipeline.core.records import ImageRecord, Records, read_image, sample
from pipeline.imaging import planes, sheet, transforms
from pipeline.jobs import score_maps
from pipeline.jobs.engine import Engine, Part

HEIGHT = 128  # px of a strip
LONGEST = 512  # px of the long side of an inspected image: affinities grow with its fourth power
WEIGHTS = "_weights"  # inner tensors whose names end so are tables by layer and head
BEST = 4  # images of each class that match best what the method suppresses beside it


def write(path: Path, records: Records, parts: Sequence[Part], job: score_maps.Job, *, engine: Engine, what: str) -> None:
    """Writes INSPECTION: inner maps of a few images and, of a method with surroundings, what it suppresses by class."""
    count = job.settings.inspect
    method = score_maps.load(job.method, job.backbone, job.model.resolve(), job.device, str(job.out.resolve()))
    pictures = inspections(
        chosen(records.table, count), method, len(job.labels), job.root, job.settings.long_side, job.device
    )
    if shows_surroundings(method, count):
        summarise = partial(summarise_surroundings, job=job)
        summaries = engine.map_parts(summarise, [tagged(part) for part in parts], what=what, device=job.device, images=len)
        pictures = with_surroundings(pictures, merged(summaries))
    store.write_part(
        path, store.INSPECTION, pictures, labels=job.labels, part=0, parts=1, params_digest="", compression="gzip"
    )


def tagged(records: Sequence[ImageRecord]) -> RecordTable:
    """Those of split train that have a class."""
    return RecordTable.of(records).of_split("train").with_classes()


def chosen(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """`count` images of split train that have a class, fixed by their ids, in id order."""
    return sample(tagged(records), count)


def inspections(
    records: Sequence[ImageRecord], method: Any, classes: int, root: Path, long_side: int | None, device: str
) -> Iterator[store.Item]:
    """INSPECTION items: maps of each image's first class at scale 1, long side at most LONGEST, over their maximum."""
    for record in records:
        assert record.tags  # as `chosen` gives them
        photograph = read_image(record, root)
        batch = transforms.tensor_of(_view(photograph, method, long_side), device)[None]
        with torch.inference_mode():  # as where score maps are made: memory that the method keeps is not for other modes
            inner = {name: value[0].float().cpu().numpy() for name, value in method.inspect(batch).items()}
        maps = {name: value[record.tags[0]] for name, value in inner.items() if value.ndim == 3 and len(value) == classes}
        tables = [value for name, value in inner.items() if name.endswith(WEIGHTS)]
        small = _small(photograph)
        panels = [small, *(sheet.over(small, _relative(plane, small.shape[:2])) for plane in maps.values())]
        item = store.empty(store.INSPECTION) | {
            "jpeg": np.frombuffer(sheet.strip(panels, HEIGHT, smooth=len(panels)), np.uint8),
            "panels": _utf8(",".join(["photograph", *maps])),
        }
        yield record.id, item | ({"weights": tables[0].astype(np.float32)} if tables else {})


@dataclass
class SurroundingsSummary:
    """How well images without their classes match what is suppressed beside each class, summed over images.

    description  what is suppressed, in words; "" where no image was looked at
    sums         f64[c,2] of cosines: images of the class with it masked out, and images of other classes, each the mean over
                 its classes masked out one at a time
    images       i64[c,2] numbers of summands
    best         by class: (minus the cosine, id, JPEG) of the BEST images of the class with the highest cosine, ties by id
    """

    description: str
    sums: np.ndarray
    images: np.ndarray
    best: dict[int, list[tuple[float, str, bytes]]]

    @classmethod
    def empty(cls, classes: int) -> SurroundingsSummary:
        return cls("", np.zeros((classes, 2)), np.zeros((classes, 2), np.int64), {})

    def is_among_best(self, label: int, cosine: float, image_id: str) -> bool:
        """Whether the image is among the best of its class so far."""
        rivals = self.best.get(label, [])
        return len(rivals) < BEST or (-cosine, image_id) < rivals[-1][:2]

    def add(self, label: int, entry: tuple[float, str, bytes]) -> None:
        self.best[label] = sorted([*self.best.get(label, []), entry])[:BEST]


def shows_surroundings(method: Any, inspect: int) -> bool:
    """Whether the report shows what the method suppresses beside its classes. inspect: extract.inspect."""
    return inspect > 0 and isinstance(method, WithSurroundings)


def summarise_surroundings(records: Sequence[ImageRecord], job: score_maps.Job) -> SurroundingsSummary:
    """Of one part: all `tagged` images once, at scale 1, the long side at most LONGEST. Nothing depends on other parts."""
    method = score_maps.load(job.method, job.backbone, job.model.resolve(), job.device, str(job.out.resolve()))
    summary = SurroundingsSummary.empty(len(job.labels))
    batches = list(score_maps.alike(records, job.settings.views_per_batch))

    def load(batch: Sequence[ImageRecord]) -> tuple[list[np.ndarray], np.ndarray]:
        photographs = [read_image(record, job.root) for record in batch]
        return photographs, np.stack([_view(photograph, method, job.settings.long_side) for photograph in photographs])

    with closing(overlap.ahead(load, batches, job.loaders, min(1, job.loaders))) as loaded:
        for batch, (photographs, views) in zip(batches, loaded, strict=True):
            if not _add_batch(summary, batch, photographs, views, method, job.device):
                break
    return summary


def _add_batch(
    summary: SurroundingsSummary, batch: Sequence[ImageRecord], photographs: Sequence[np.ndarray], views: np.ndarray,
    method: Any, device: str,
) -> bool:  # fmt: skip
    """Equally sized images u8[h,w,3] and their views u8[b,·,·,3]; False where nothing is suppressed."""
    pairs = [(row, label) for row, record in enumerate(batch) for label in record.tags or ()]
    with torch.inference_mode():
        surroundings: Surroundings = method.surroundings(
            transforms.tensor_of(views, device), torch.tensor(pairs, device=device)
        )
    summary.description = surroundings.description
    if not surroundings.match.shape[1]:
        return False
    match, outside = surroundings.match.float().cpu().numpy(), surroundings.outside.float().cpu().numpy()
    _count(summary, batch, pairs, match)
    for place, (row, label) in enumerate(pairs):
        cosine, record = float(match[place, label]), batch[row]
        if summary.is_among_best(label, cosine, record.id):
            summary.add(label, (-cosine, record.id, _without_class(photographs[row], outside[place])))
    return True


def _count(
    summary: SurroundingsSummary, batch: Sequence[ImageRecord], pairs: Sequence[tuple[int, int]], match: np.ndarray
) -> None:
    rows = np.array([row for row, _ in pairs])
    for row, record in enumerate(batch):
        cosines = match[rows == row].astype(np.float64)  # [classes of the image, c]
        own = np.zeros(match.shape[1], bool)
        own[list(record.tags or ())] = True
        summary.sums[own, 0] += [cosines[place, label] for place, label in enumerate(record.tags or ())]
        summary.sums[~own, 1] += cosines.mean(axis=0)[~own]
        summary.images += np.stack([own, ~own], axis=1)


def merged(parts: Iterable[SurroundingsSummary]) -> SurroundingsSummary:
    """Of all parts, in their order."""
    total: SurroundingsSummary | None = None
    for part in parts:
        total = total or SurroundingsSummary.empty(len(part.sums))
        total.description = total.description or part.description
        total.sums += part.sums
        total.images += part.images
        for label, entries in part.best.items():
            for entry in entries:
                total.add(label, entry)
    return total or SurroundingsSummary.empty(0)


def with_surroundings(items: Iterable[store.Item], summary: SurroundingsSummary) -> Iterator[store.Item]:
    """INSPECTION items in id order: those given, and those that `summary` shows, whose number the classes bound."""
    rows = {image_id: dict(item) for image_id, item in items}
    shown: dict[str, list[tuple[int, float, bytes]]] = {}
    for label in sorted(summary.best):
        for lower, image_id, jpeg in summary.best[label]:
            shown.setdefault(image_id, []).append((label, -lower, jpeg))
    means = summary.sums / np.maximum(summary.images, 1)
    for image_id in sorted({*rows, *shown}):
        labels, cosines, jpegs = zip(*shown.get(image_id, []), strict=True) if image_id in shown else ((), (), ())
        yield (
            image_id,
            rows.get(image_id, store.empty(store.INSPECTION))
            | {
                "description": _utf8(summary.description),
                "beside": np.array(labels, np.uint16),
                "match": np.array(cosines, np.float32),
                "means": means[list(labels)].astype(np.float32).reshape(-1, 2),
                "images": summary.images[list(labels)].astype(np.uint32).reshape(-1, 2),
                "strips": np.frombuffer(b"".join(jpegs), np.uint8),
                "strip_bytes": np.array([len(jpeg) for jpeg in jpegs], np.uint32),
            },
        )


def _without_class(photograph: np.ndarray, outside: np.ndarray) -> bytes:
    """JPEG of photograph u8[h,w,3] | the same without the class: the mean colour where outside f32[s,s] is 0."""
    small = _small(photograph)
    left = planes.upsample(outside[None], (small.shape[0], small.shape[1]))[0][..., None]
    shown = left * small + (1 - left) * 255 * transforms.PADDING
    return sheet.strip([small, np.clip(shown.round(), 0, 255).astype(np.uint8)], HEIGHT, smooth=2)


def _view(photograph: np.ndarray, method: Any, long_side: int | None) -> np.ndarray:
    longest = LONGEST if long_side is None else min(long_side, LONGEST)
    h, w = photograph.shape[:2]
    return transforms.resize(photograph, transforms.view_size((h, w), 1.0, method.stride, longest))


def _small(photograph: np.ndarray) -> np.ndarray:
    h, w = photograph.shape[:2]
    return transforms.resize(photograph, (HEIGHT, max(1, min(sheet.MAX_ASPECT * HEIGHT, round(w * HEIGHT / h)))))


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8"), np.uint8)


def _relative(plane: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """f32[gh,gw] → f32[size] in 0..1: negative evidence is none; an empty map stays empty."""
    full = planes.upsample(np.maximum(plane, 0)[None], (size[0], size[1]))[0]
    return full / full.max() if full.max() > 0 else full
