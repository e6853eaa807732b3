"""Score maps → a refiner's state, and then refined labels with a confidence per pixel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import config, overlap, plugins, refiner_state, store
from pipeline.core import records as records_file
from pipeline.core.contracts import DeviceRefiner, ImageMaps, LearnedRefiner
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Refine, Settings
from pipeline.imaging import planes
from pipeline.jobs.engine import Engine, parts_of, run_parts


@dataclass(frozen=True)
class Job:
    """All that one process needs, picklable."""

    refiner: str
    backbone: str  # name of the family in pipeline/nn, for refiners with a network
    settings: Refine
    params: Any  # the refiner's Params
    scoremaps: Path
    state: Path
    root: Path
    labels: LabelSpace
    parts: int
    params_digest: str
    out: Path
    device: str
    loaders: int  # threads that read score maps and decode images ahead of the refiner


def run(settings: Settings, *, records: Path, scoremaps: Path, refiner: Path, refined: Path, engine: Engine) -> None:
    """Stage refine: a label and a confidence per pixel of the images of split train."""
    name, refinement = settings.run.refiner, settings.section(Refine, "refine")
    params = params_of(settings, refinement)
    if is_learned(name):
        plugins.load("nn", settings.run.backbone)  # before its code is digested
    else:
        plugins.load("refiners", name).Refiner(params, refiner_state.read(refiner, name))  # so does the code of its network
    listed = records_file.read(records)
    parts = parts_of(listed.split("train"), refinement.images_per_part)
    digest = store.digest([name, dataclasses.asdict(refinement)])
    maps = store.Store(scoremaps, store.SCORE_MAPS)
    maps.require(listed.ids)
    files = store.file_digest(records), maps.logical_digest, store.file_digest(refiner)
    with store.Workspace(refined, store.digest([digest, engine.code_digest(), *files])) as work:
        device = engine.device() if refiner_state.has_network(refiner) else "cpu"
        job = Job(
            refiner=name, backbone=settings.run.backbone, settings=refinement, params=params, scoremaps=scoremaps,
            state=refiner, root=settings.root, labels=listed.labels, parts=len(parts), params_digest=digest, out=work.result,
            device=device, loaders=engine.loaders(device),
        )  # fmt: skip
        run_parts(refine_part, parts, job, out=work.result, engine=engine, what=f"refine {settings.name}")


def maps_of(scores: store.Store, record: ImageRecord) -> ImageMaps:
    """One image's score maps as refiners read them."""
    item = scores[record.id]
    affinity = item["affinity"].astype(np.float32) if item["affinity"].size else None
    rows, columns = (int(side) for side in item["grid"])
    return ImageMaps(
        item["classes"].astype(np.int64), item["scores"].astype(np.float32), record.size, affinity, (rows, columns),
        record.id
    )  # fmt: skip


def fit(
    settings: Settings, params: Any, scores: store.Store, records: Sequence[ImageRecord], engine: Engine
) -> dict[str, np.ndarray]:
    """State of the run's refiner from the score maps of `records` (split train), streamed; no ground truth is at hand."""
    seen = engine.progress(records, len(records), f"fit_refiner {settings.name}")
    return plugins.load("refiners", settings.run.refiner).fit(
        params, (maps_of(scores, record) for record in seen), lambda at: read_image(records[at], settings.root)
    )


def is_learned(name: str) -> bool:
    """Whether refiner `name` is learned by the training loop."""
    return isinstance(plugins.load("refiners", name), LearnedRefiner)


def load(job: Job) -> tuple[Any, float]:
    """The refiner, ready to be called, and its threshold."""
    state = refiner_state.read(job.state, job.refiner)
    module, threshold = plugins.load("refiners", job.refiner), float(state["threshold"][0])
    if job.device != "cpu":  # refiners without a network do not pay for torch
        from pipeline.training.precision import allow_tf32

        allow_tf32(False)
    if not isinstance(module, LearnedRefiner):
        refiner = module.Refiner(job.params, state)
        if isinstance(refiner, DeviceRefiner):
            refiner.to(job.device)
        return refiner, threshold
    import torch  # refiners without a network do not pay for it

    params = config.parse(module.FitParams, refiner_state.fitted_params(job.state), "fit_refiner", job.state)
    network = module.Network(params.model, params.schedule, plugins.load("nn", job.backbone))
    tensors = refiner_state.network_tensors(state)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    return module.Refiner(job.params, state, network.to(job.device).eval()), threshold


_READY: dict[str, tuple[Any, store.Store, float]] = {}  # one per process


def refine_part(item: tuple[int, Sequence[ImageRecord]], job: Job) -> int:
    """Writes one part of refined labels; returns its number of images."""
    part, records = item
    key = str(job.out.resolve())  # the work space's name stands for all inputs
    if key not in _READY:
        refiner, threshold = load(job)
        _READY[key] = refiner, store.Store(job.scoremaps, store.SCORE_MAPS), threshold
    refiner, scores, threshold = _READY[key]

    def maps_and_image(record: ImageRecord) -> tuple[ImageMaps, np.ndarray | None]:
        maps = maps_of(scores, record)
        return maps, read_image(record, job.root) if len(maps.classes) else None

    with closing(overlap.ahead(maps_and_image, records, job.loaders, job.loaders)) as loaded:
        items = (
            (record.id, refine_one(refiner, maps, image, job.settings, threshold))
            for record, (maps, image) in zip(records, loaded, strict=True)
        )
        store.write_part(
            store.part_path(job.out, part), store.REFINED, items, labels=job.labels, part=part, parts=job.parts,
            params_digest=job.params_digest, compression=job.settings.compression,
        )  # fmt: skip
    return len(records)


def refine_one(
    refiner: Any, maps: ImageMaps, image: np.ndarray | None, settings: Refine, threshold: float
) -> dict[str, np.ndarray]:
    """REFINED fields of an image u8[h,w,3]. One in which no class is present is background, with certainty, at no cost."""
    h, w = maps.size
    if image is None:
        return {
            "label": np.zeros((h, w), np.uint8),
            "confidence": np.full((h, w), store.CONFIDENCE_STEPS, np.uint8),
            "disagree": np.zeros((h, w), np.uint8),
        }
    probabilities = refiner(image, maps, threshold)
    disagree = np.zeros((h, w), np.uint8)
    if settings.disagree_at is not None:
        low, high = (
            planes.labels_of(refiner(image, maps, threshold * factor), maps.classes) for factor in settings.disagree_at
        )
        disagree = (planes.trinary_labels(low, high) == IGNORE).astype(np.uint8)
    confidence = np.clip(planes.confidence_of(probabilities), 0, 1)
    return {
        "label": planes.labels_of(probabilities, maps.classes),
        "confidence": np.round(confidence * store.CONFIDENCE_STEPS).astype(np.uint8),
        "disagree": disagree,
    }


def params_of(settings: Settings, refinement: Refine) -> Any:
    """refine.options as the refiner's Params."""
    return settings.part(plugins.load("refiners", settings.run.refiner).Params, refinement.options, "refine.options")
