"""Score maps → a refiner's state, and then refined labels with a confidence per pixel."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.core import config, plugins, store
from pipeline.core import records as records_file
from pipeline.core.contracts import ImageMaps, LearnedRefiner
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Refine, Settings
from pipeline.imaging import planes
from pipeline.jobs.engine import Engine, parts_of, run_parts

METADATA_KEY = "refiner"
NETWORK = "network."  # before the key names of a learned refiner's network, in its state


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


def run(settings: Settings, *, records: Path, scoremaps: Path, refiner: Path, refined: Path, engine: Engine) -> None:
    """Stage refine: a label and a confidence per pixel of the images of split train."""
    name, refinement = settings.run.refiner, settings.section(Refine, "refine")
    params = params_of(settings, refinement)
    if has_network(name):
        plugins.load("nn", settings.run.backbone)  # before its code is digested
    listed = records_file.read(records)
    parts = parts_of(listed.split("train"), refinement.images_per_part)
    digest = store.digest([name, dataclasses.asdict(refinement)])
    maps = store.Store(scoremaps, store.SCORE_MAPS)
    maps.require(record.id for record in listed)
    files = store.file_digest(records), maps.logical_digest, store.file_digest(refiner)
    with store.Workspace(refined, store.digest([digest, engine.code_digest(), *files])) as work:
        job = Job(
            refiner=name, backbone=settings.run.backbone, settings=refinement, params=params, scoremaps=scoremaps,
            state=refiner, root=settings.root, labels=listed.labels, parts=len(parts), params_digest=digest, out=work.result,
            device=engine.device() if has_network(name) else "cpu",
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


def fit(name: str, params: Any, scores: store.Store, records: Sequence[ImageRecord], root: Path) -> dict[str, np.ndarray]:
    """State of refiner `name` from the score maps of `records` (split train), streamed; no ground truth is at hand."""
    return plugins.load("refiners", name).fit(
        params, (maps_of(scores, record) for record in records), lambda at: read_image(records[at], root)
    )


def has_network(name: str) -> bool:
    """Whether refiner `name` is learned by the training loop."""
    return isinstance(plugins.load("refiners", name), LearnedRefiner)


def network_state(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A network's tensors as part of a refiner's state."""
    return {NETWORK + name: value.numpy() for name, value in tensors.items()}


def write_state(path: Path, name: str, state: Mapping[str, np.ndarray], params: str = "{}") -> None:
    """safetensors with the refiner's name and FitParams (JSON) under one metadata key: several come in random order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        {key: np.ascontiguousarray(state[key]) for key in sorted(state)},
        partial,
        metadata={METADATA_KEY: json.dumps([name, params])},
    )
    partial.replace(path)


def read_state(path: Path, name: str) -> dict[str, np.ndarray]:
    """ValueError if the state belongs to another refiner."""
    with safe_open(path, "np") as file:
        fitted_for = json.loads((file.metadata() or {}).get(METADATA_KEY, "[null]"))[0]
        if fitted_for != name:
            raise ValueError(f"{path} was fitted for refiner {fitted_for!r}, not {name!r}; run fit_refiner again")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def fitted_params(path: Path) -> Any:
    """The FitParams, as plain values, that a state was fitted with."""
    with safe_open(path, "np") as file:
        return json.loads(json.loads((file.metadata() or {})[METADATA_KEY])[1])


def load(job: Job) -> tuple[Any, float]:
    """The refiner, ready to be called, and its threshold."""
    state = read_state(job.state, job.refiner)
    module, threshold = plugins.load("refiners", job.refiner), float(state["threshold"][0])
    if not isinstance(module, LearnedRefiner):
        return module.Refiner(job.params, state), threshold
    import torch  # refiners without a network do not pay for it

    params = config.parse(module.FitParams, fitted_params(job.state), "fit_refiner", job.state)
    network = module.Network(params.model, params.schedule, plugins.load("nn", job.backbone))
    tensors = {
        name.removeprefix(NETWORK): torch.from_numpy(value) for name, value in state.items() if name.startswith(NETWORK)
    }
    network.load_state_dict(tensors)
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
    items = ((record.id, refine_one(refiner, maps_of(scores, record), record, job, threshold)) for record in records)
    store.write_part(
        store.part_path(job.out, part), store.REFINED, items, labels=job.labels, part=part, parts=job.parts,
        params_digest=job.params_digest, compression=job.settings.compression,
    )  # fmt: skip
    return len(records)


def refine_one(refiner: Any, maps: ImageMaps, record: ImageRecord, job: Job, threshold: float) -> dict[str, np.ndarray]:
    """REFINED fields of one image. An image in which no class is present is background, with certainty, at no cost."""
    h, w = maps.size
    if not len(maps.classes):
        return {
            "label": np.zeros((h, w), np.uint8),
            "confidence": np.full((h, w), store.CONFIDENCE_STEPS, np.uint8),
            "disagree": np.zeros((h, w), np.uint8),
        }
    image = read_image(record, job.root)
    probabilities = refiner(image, maps, threshold)
    disagree = np.zeros((h, w), np.uint8)
    if job.settings.disagree_at is not None:
        low, high = (
            planes.labels_of(refiner(image, maps, threshold * factor), maps.classes) for factor in job.settings.disagree_at
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
