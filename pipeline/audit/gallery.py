"""Results of one column, truth and photographs → small pictures of some images, for the report's gallery.

An image is of one split, so the score maps and decoder masks of train and val share a name here.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import stage_order
from pipeline.audit import tally
from pipeline.core import store
from pipeline.core.records import ImageRecord, Records, read_image, sample
from pipeline.imaging import planes

PER_ITEM = 16  # images that one process draws at a time
WORST, RANDOM = 1, 2  # bits of `kind`
PHOTOGRAPH_QUALITY, SCORE_QUALITY = 70, 75
SCORE_SIDE = 2  # score maps are kept at 1 / 2 of a thumbnail's side: they come from a grid at stride 4 and are smooth


@dataclass(frozen=True)
class Shown:
    """An image of the gallery; its mIoU f32[stage_order.GALLERY] at full size, NaN where it has no such mask or no truth."""

    record: ImageRecord
    kind: int
    miou: np.ndarray


def shown(audit: tally.Audited, records: Records, count: int) -> list[Shown]:
    """At most `count` images in id order, as `picked` finds them by their quality."""
    chosen = picked(audit.quality, records, count)
    ids = {record.id for record, _ in chosen}
    miou = {(row.id, stage_order.without_split(row.stage)): row.miou for row in audit.rows if row.id in ids}
    return [
        Shown(record, kind, np.array([miou.get((record.id, stage), math.nan) for stage in stage_order.GALLERY], np.float32))
        for record, kind in chosen
    ]


def picked(quality: Mapping[str, float], records: Records, count: int) -> list[tuple[ImageRecord, int]]:
    """At most `count` images with their kind, in id order; each split has a part in proportion to its size.

    Half of them are random, fixed by their ids alone and therefore the same for every column; the others are those of the
    lowest quality. Images without quality come after all others. Where there are no more than `count` images, all are picked.
    """
    found: dict[str, int] = {}
    train, val = records.split("train"), records.split("val")
    of_train = round(count * len(train) / max(1, len(records)))
    for images, share in ((train, of_train), (val, count - of_train)):
        quota = min(len(images), share)
        by_quality = sorted((record.id for record in images), key=lambda i: _rank(quality.get(i, math.nan), i))
        half = (quota + 1) // 2
        random = {record.id for record in sample(images, half)}
        others = [image_id for image_id in by_quality if image_id not in random][: quota - half]
        worst = {*others, *by_quality[: quota - half]}  # a random image may be among the worst too
        found |= {i: RANDOM * (i in random) + WORST * (i in worst) for i in random | worst}
    return [(record, found[record.id]) for record in sorted(records, key=lambda one: one.id) if record.id in found]


def _rank(quality: float, image_id: str) -> tuple[bool, float, str]:
    return math.isnan(quality), 0.0 if math.isnan(quality) else quality, image_id


def draw_some(chosen: Sequence[Shown], inputs: tally.Inputs) -> list[store.Item]:
    """GALLERY items of some images."""
    stores = tally.opened(inputs)
    return [(one.record.id, _draw(one, stores, inputs)) for one in chosen]


def _draw(one: Shown, stores: tally.Stores, inputs: tally.Inputs) -> dict[str, np.ndarray]:
    record = one.record
    labels, best = _labels(record, stores, inputs.level)
    truth = stores.truth.read(record.id, "mask") if record.id in stores.truth else None
    size = planes.fitted(record.size, inputs.settings.thumbnail)
    photograph = _scaled(Image.fromarray(read_image(record, inputs.root)), size, Image.Resampling.BOX)
    coarse = (max(1, size[0] // SCORE_SIDE), max(1, size[1] // SCORE_SIDE))
    heat = _scaled(Image.fromarray(np.round(255 * np.clip(best, 0, 1)).astype(np.uint8)), coarse, Image.Resampling.BOX)
    maps = [planes.nearest(labels[stage], size) for stage in stage_order.GALLERY if stage in labels]
    return {
        "kind": np.array([one.kind], np.uint8),
        "size": np.array(size, np.uint16),
        "photograph": _encoded(photograph, "WEBP", quality=PHOTOGRAPH_QUALITY, method=4),
        "scores": _encoded(heat, "JPEG", quality=SCORE_QUALITY, optimize=True),
        "present": np.array([stage in labels for stage in stage_order.GALLERY], np.uint8),
        "maps": _packed(np.stack(maps)),
        "truth": np.zeros(0, np.uint8) if truth is None else _packed(planes.nearest(truth, size)),
        "miou": one.miou,
    }


def _labels(record: ImageRecord, stores: tally.Stores, level: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Mask values u8[h,w] of every stage that the image has, and the winner's score f32[h,w]."""
    winner, best, _ = tally.winner_of(stores.scoremaps[record.id], record)
    labels = {"score_maps": np.where(best > level, winner, 0).astype(np.uint8)}
    decoded = stores.scoremaps.read(record.id, "decoded")
    if decoded.size:
        labels["decoder"] = decoded
    if record.split == "val":
        labels["predictions"] = stores.predictions.read(record.id, "label")
    else:
        labels["refined"] = stores.refined.read(record.id, "label")
        labels["pseudo_masks"] = stores.pseudo_masks.read(record.id, "mask")
    return labels, best


def _scaled(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    rows, columns = size
    return image.resize((columns, rows), resample)


def _packed(values: np.ndarray) -> np.ndarray:
    """One zlib stream for all masks of an image: a later stage repeats most of an earlier one, and takes half of what PNGs take."""
    return np.frombuffer(zlib.compress(np.ascontiguousarray(values).tobytes(), 9), np.uint8)


def _encoded(image: Image.Image, kind: str, **options: int | bool) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8)
