"""Results of a run, truth and photographs → thumbnails of a selection of images, for the report's gallery.

An image is of one split, so the stages of train and val share their names here: score_maps stands for score_maps_val too.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import stage_order
from pipeline.audit import tally
from pipeline.audit.row_table import RowTable
from pipeline.core import store
from pipeline.core.record_table import SPLITS
from pipeline.core.records import ImageRecord, Records, sample
from pipeline.imaging import planes

BATCH = 16  # images that a process draws at a time
WORST, RANDOM = 1, 2  # bits of `kind`: why an image was selected
PHOTOGRAPH_QUALITY, MAP_QUALITY = 70, 75
MAP_STRIDE = 2  # of score and confidence maps, in px of the thumbnail: they are smooth, and a quarter of the bytes


@dataclass(frozen=True)
class GalleryImage:
    """An image of the gallery.

    kind  WORST, RANDOM, or the sum of both
    miou  f32[len(stage_order.GALLERY)], of its masks at full size; NaN without such a mask, and without truth
    """

    record: ImageRecord
    kind: int
    miou: np.ndarray


def gallery_images(audit: tally.RunAudit, records: Records, count: int) -> list[GalleryImage]:
    """At most `count` images in id order, from `selection` by quality."""
    return [
        GalleryImage(record, kind, _miou(audit.rows.of_image(record.id)))
        for record, kind in selection(audit.quality, records, count)
    ]


def _miou(rows: RowTable) -> np.ndarray:
    """The rows of an image → GalleryImage.miou."""
    miou = {stage_order.without_split(row.stage): row.miou for row in rows}
    return np.array([miou.get(stage, math.nan) for stage in stage_order.GALLERY], np.float32)


def selection(quality: np.ndarray, records: Records, count: int) -> list[tuple[ImageRecord, int]]:
    """At most `count` images with their kind, in id order; each split is represented in proportion to its size.

    Half of them are random, drawn by their ids alone and so the same for every run; the others are those of the lowest
    quality f64[images], 0..1 or NaN, which counts as better than all. All images where there are at most `count`.
    """
    kinds: dict[str, int] = {}
    splits = {name: np.flatnonzero(records.table.columns["split"] == at) for at, name in enumerate(SPLITS)}
    of_train = round(count * len(splits["train"]) / max(1, len(records)))
    for name, most in (("train", of_train), ("val", count - of_train)):
        images = splits[name]
        quota = min(len(images), most)
        by_quality = images[np.argsort(quality[images], kind="stable")][:quota]  # NaN last, equals in the order of ids
        worst = [records.ids[int(row)] for row in by_quality]
        half = (quota + 1) // 2
        random = {record.id for record in sample(records.split(name), half)}
        others = [image_id for image_id in worst if image_id not in random][: quota - half]
        chosen = {*others, *worst[: quota - half]}  # a random image may be among the worst too
        kinds |= {image_id: RANDOM * (image_id in random) + WORST * (image_id in chosen) for image_id in random | chosen}
    by_id = records.by_id()
    return [(by_id[image_id], kinds[image_id]) for image_id in sorted(kinds)]


def items(images: Sequence[GalleryImage], inputs: tally.Inputs) -> list[store.Item]:
    """GALLERY items of a batch of images."""
    stores = tally.cached_stores(inputs)
    with closing(tally.photographs([image.record for image in images], inputs)) as decoded:
        return [
            (image.record.id, _fields(image, photograph, stores, inputs))
            for image, photograph in zip(images, decoded, strict=True)
        ]


def _fields(
    image: GalleryImage, photograph: np.ndarray, stores: tally.Stores, inputs: tally.Inputs
) -> dict[str, np.ndarray]:
    record = image.record
    labels, best, confidence = _results(record, stores, inputs.threshold)
    truth = stores.truth.read(record.id, "mask") if record.id in stores.truth else None
    size = planes.fitted(record.size, inputs.settings.thumbnail)
    thumbnail = _scaled(Image.fromarray(photograph), size, Image.Resampling.BOX)
    scores = np.round(255 * np.clip(best, 0, 1)).astype(np.uint8)
    masks = [planes.nearest(labels[stage], size) for stage in stage_order.GALLERY if stage in labels]
    return {
        "kind": np.array([image.kind], np.uint8),
        "size": np.array(size, np.uint16),
        "photograph": _encoded(thumbnail, "WEBP", quality=PHOTOGRAPH_QUALITY, method=4),
        "scores": _grey(scores, size),
        "confidence": _grey(confidence, size),
        "present": np.array([stage in labels for stage in stage_order.GALLERY], np.uint8),
        "maps": _packed(np.stack(masks)),
        "truth": np.zeros(0, np.uint8) if truth is None else _packed(planes.nearest(truth, size)),
        "miou": image.miou,
    }


def _results(
    record: ImageRecord, stores: tally.Stores, threshold: float
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Mask values u8[h,w] of every stage that the image has, the best class's score f32[h,w], and the confidence u8[h,w] of
    the refined mask, on val of the prediction."""
    winner, best, _ = tally.winning_class(stores.scoremaps[record.id], record)
    labels = {"score_maps": np.where(best > threshold, winner, 0).astype(np.uint8)}
    decoded = stores.scoremaps.read(record.id, "decoded")
    if decoded.size:
        labels["decoder"] = decoded
    if record.split == "val":
        labels["predictions"] = stores.predictions.read(record.id, "label")
        return labels, best, stores.predictions.read(record.id, "confidence")
    labels["refined"] = stores.refined.read(record.id, "label")
    labels["pseudo_masks"] = stores.pseudo_masks.read(record.id, "mask")
    if record.id in stores.relabelled:
        labels["relabelled"] = stores.relabelled.read(record.id, "label")
    return labels, best, stores.refined.read(record.id, "confidence")


def _grey(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """u8[h,w] → the bytes of a JPEG at size / MAP_STRIDE. size: (rows, columns) of the thumbnail."""
    coarse = (max(1, size[0] // MAP_STRIDE), max(1, size[1] // MAP_STRIDE))
    scaled = _scaled(Image.fromarray(values), coarse, Image.Resampling.BOX)
    return _encoded(scaled, "JPEG", quality=MAP_QUALITY, optimize=True)


def _scaled(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    rows, columns = size
    return image.resize((columns, rows), resample)


def _packed(values: np.ndarray) -> np.ndarray:
    """Masks u8[...] → a zlib stream. All masks of an image share one, half the size of PNGs: stages differ little."""
    return np.frombuffer(zlib.compress(np.ascontiguousarray(values).tobytes(), 9), np.uint8)


def _encoded(image: Image.Image, kind: str, **options: int | bool) -> np.ndarray:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return np.frombuffer(out.getvalue(), np.uint8)
