"""Images + segmenter → predictions: sliding windows over several scales and mirror images, then perhaps a CRF."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core import config, plugins, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Segment
from pipeline.crf import CrfSettings, dense_crf, unary_from_probabilities
from pipeline.imaging import planes, transforms
from pipeline.training import checkpoint
from pipeline.training.loop import PRECISIONS
from pipeline.training.settings import Training

WINDOWS_PER_BATCH = 8


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable."""

    segmenter: str
    weights: Path
    settings: Segment
    crf: CrfSettings | None
    root: Path
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path
    device: str


@lru_cache(maxsize=1)
def load(name: str, weights: Path, device: str, run: str) -> Any:
    """The trained segmenter, in eval mode on device; kept for as long as `run`, the work space, is the same."""
    del run
    told = checkpoint.read_metadata(weights)
    if told["plugin"] != name:
        raise ValueError(f"{weights} was trained as segmenter {told['plugin']!r}, not {name!r}")
    module = plugins.load("segmenters", name)
    training = config.parse(Training, json.loads(told["section"]), "retrain", weights)
    params = config.parse(module.Params, training.model, "retrain.model", weights)
    built = module.Segmenter(LabelSpace(tuple(json.loads(told["labels"]))), params, training.schedule, plugins.load("nn", name))
    checkpoint.load_into(built, weights)
    return built.to(device).eval()


def segment_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part of predictions; returns its number of images."""
    part, records = item
    if job.device == "cpu":
        torch.set_num_threads(1)
    model = load(job.segmenter, job.weights.resolve(), job.device, str(job.out.resolve()))
    items = ((record.id, segment_one(read_image(record, job.root), model, job)) for record in records)
    store.write_part(
        store.part_path(job.out, part), store.PREDICTIONS, items, labels=job.labels, part=part, parts=job.parts,
        params_digest=job.params_digest, compression=job.settings.compression,
    )  # fmt: skip
    return len(records)


def segment_one(image: np.ndarray, model: Any, job: Job) -> dict[str, np.ndarray]:
    """PREDICTIONS fields of one image u8[h,w,3]."""
    found = probabilities(image, model, job.settings, job.device)
    if job.crf is not None:
        found = _refined(image, found, job.crf)
    confidence = np.clip(planes.confidence_of(found), 0, 1)
    return {
        "label": found.argmax(axis=0).astype(np.uint8),
        "confidence": np.round(confidence * store.CONFIDENCE_STEPS).astype(np.uint8),
    }


def _refined(image: np.ndarray, found: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """CRF over the planes that win somewhere (WeakTr section 2.4); the others become 0."""
    winners = np.unique(found.argmax(axis=0))
    out = np.zeros_like(found)
    out[winners] = dense_crf(image, unary_from_probabilities(found[winners]), settings)
    return out


@torch.inference_mode()
def probabilities(image: np.ndarray, model: Any, settings: Segment, device: str) -> np.ndarray:
    """u8[h,w,3] → f32[c+1,h,w], the mean of the softmax over all scales and mirror images."""
    h, w = image.shape[:2]
    base = 1.0 if settings.short_side is None else settings.short_side / min(h, w)
    total: Tensor | None = None
    for scale in settings.scales:
        size = max(1, round(h * base * scale)), max(1, round(w * base * scale))
        view = torch.from_numpy(transforms.resize(image, size).copy()).to(device).permute(2, 0, 1).float() / 255
        for mirrored in (False, True) if settings.flip else (False,):
            logits = windowed(view.flip(-1) if mirrored else view, model, settings, device)
            logits = logits.flip(-1) if mirrored else logits
            if logits.shape[-2:] != (h, w):
                logits = F.interpolate(logits[None], (h, w), mode="bilinear", align_corners=False)[0]
            share = logits.softmax(dim=0)
            total = share if total is None else total.add_(share)
    assert total is not None  # scales are not empty
    return (total / (len(settings.scales) * (2 if settings.flip else 1))).cpu().numpy()


def windowed(view: Tensor, model: Any, settings: Segment, device: str) -> Tensor:
    """f32[3,h,w] → logits f32[c+1,h,w], averaged where windows overlap. Views smaller than a window are one window."""
    h, w = view.shape[-2:]
    high, wide = min(settings.window, h), min(settings.window, w)
    corners = [
        (top, left) for top in starts(h, high, settings.window_stride) for left in starts(w, wide, settings.window_stride)
    ]
    total, count = None, view.new_zeros(h, w)
    dtype = PRECISIONS[settings.precision]
    for at in range(0, len(corners), WINDOWS_PER_BATCH):
        some = corners[at : at + WINDOWS_PER_BATCH]
        batch = torch.stack([view[:, top : top + high, left : left + wide] for top, left in some])
        with torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype is not None):
            logits = model.segment(batch).float()
        if total is None:
            total = view.new_zeros(logits.shape[1], h, w)
        for (top, left), window in zip(some, logits, strict=True):
            total[:, top : top + high, left : left + wide] += window
            count[top : top + high, left : left + wide] += 1
    assert total is not None  # there is at least one window
    return total / count


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every stride px, the last one aligned to the border."""
    return sorted({*range(0, length - window + 1, stride), length - window})
