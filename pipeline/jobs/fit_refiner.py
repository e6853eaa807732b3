"""Stage fit_refiner: score maps → a refiner's state: a threshold and, of a refiner that learns, its trained network.

Torch is imported where it is needed, since the stage fits refiners without it as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import plugins, refiner_state, store
from pipeline.core import records as records_file
from pipeline.core.contracts import CheckedRefiner, LearnedRefiner, SupervisedRefiner
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.core.sections import Settings
from pipeline.jobs.engine import Engine, parts_of, run_parts
from pipeline.jobs.refine import fit, is_learned, maps_of
from pipeline.jobs.training_run import follow

if TYPE_CHECKING:
    from pipeline.training import loop

LABELS_PER_PART = 64


@dataclass(frozen=True)
class LabelJob:
    """All that one process needs to make labels, picklable."""

    refiner: str
    params: Any  # the refiner's FitParams
    threshold: float
    scoremaps: Path
    root: Path
    labels: LabelSpace
    parts: int
    digest: str
    out: Path


def run(settings: Settings, *, records: Path, scoremaps: Path, init: Path, refiner: Path, engine: Engine) -> None:
    """Stage fit_refiner: the threshold of the score maps, and what a learned refiner learns. No mask is read."""
    name, params = settings.run.refiner, params_of(settings)
    check(settings, params)
    listed = records_file.read(records)
    scores = store.Store(scoremaps, store.SCORE_MAPS)
    scores.require(listed.ids)
    state = fit(settings, params, scores, listed.split("train"), engine)
    engine.info("threshold %.4f", float(state["threshold"][0]))
    if not is_learned(name):
        write(refiner, name, state, params)
        return
    family = settings.run.backbone
    plugins.load("nn", family)  # before its code is digested
    files = store.file_digest(records), scores.logical_digest, store.file_digest(init)
    key = store.digest([name, family, described(params), engine.code_digest(), *files])
    with store.Workspace(refiner, key) as work:
        labels, device = work.folder / "labels", engine.device()
        parts = parts_of(listed.split("train"), LABELS_PER_PART)
        threshold = float(state["threshold"][0])
        job = LabelJob(name, params, threshold, scoremaps, settings.root, listed.labels, len(parts), key, labels)
        run_parts(label_part, parts, job, out=labels, engine=engine, what=f"labels for refiner {settings.name}")
        made = training(
            name, params, family=family, init=init, records=listed.split("train"), root=settings.root,
            classes=len(listed.labels), labels=labels, work=work.folder, device=device, engine=engine,
        )  # fmt: skip
        state |= train(made, engine, f"fit_refiner {settings.name}")
        write(work.result / refiner.name, name, state, params)


def params_of(settings: Settings) -> Any:
    """Section fit_refiner as the refiner's FitParams."""
    return settings.section(plugins.load("refiners", settings.run.refiner).FitParams, "fit_refiner")


def check(settings: Settings, params: Any) -> None:
    """ValueError if the augmentation would change pixels whose labels do not follow, or the refiner's own check fails."""
    refiner = plugins.load("refiners", settings.run.refiner)
    if isinstance(refiner, CheckedRefiner):
        refiner.check(params)
    if isinstance(refiner, LearnedRefiner) and (params.augment.rand_augment is not None or params.augment.erase > 0):
        raise ValueError(
            f"{settings.file}: fit_refiner.augment: rand_augment must be null and erase 0, since labels would not follow "
            f"(edit {settings.file})"
        )


@lru_cache(maxsize=1)
def _scores(folder: Path) -> store.Store:
    return store.Store(folder, store.SCORE_MAPS)


def label_part(item: tuple[int, Sequence[ImageRecord]], job: LabelJob) -> int:
    """Writes one part of labels to learn from, as a store of masks; returns its number of images."""
    part, records = item
    make, scores = plugins.load("refiners", job.refiner).training_labels, _scores(job.scoremaps)

    def items() -> Iterator[store.Item]:
        for record in records:
            maps = maps_of(scores, record)
            image = read_image(record, job.root)
            yield record.id, {"mask": make(job.params, image, maps, job.threshold)}

    store.write_part(
        store.part_path(job.out, part), store.PSEUDO_MASKS, items(), labels=job.labels, part=part, parts=job.parts,
        params_digest=job.digest, compression="gzip",
    )  # fmt: skip
    return len(records)


def build(name: str, params: Any, family: str, init: Path) -> Any:
    """The network with its initial weights, the same in every process; at the top level, so that ranks can call it."""
    import torch

    from pipeline.training.data import seed_of

    torch.manual_seed(seed_of("build", params.seed))
    backbones = plugins.load("nn", family)
    network = plugins.load("refiners", name).Network(params.model, params.schedule, backbones)
    network.load_initial(backbones, init)
    return network


def training(
    name: str,
    params: Any,
    *,
    family: str,
    init: Path,
    records: Sequence[ImageRecord],
    root: Path,
    classes: int,
    labels: Path,
    work: Path,
    device: str,
    engine: Engine,
) -> loop.Job:
    """The job of the common training loop, on all of `records`, whose labels lie in the store `labels`."""
    from pipeline.training import loop
    from pipeline.training.data import TrainingImages

    masks = store.Store(labels, store.PSEUDO_MASKS)
    return loop.Job(
        build=partial(build, name, params, family, init),
        images=TrainingImages(records, root, classes, params.augment, params.seed, masks),
        seed=params.seed,
        precision=params.precision,
        work=work,
        device=device,
        ranks=engine.ranks(params.schedule.shards),
        loaders=engine.loaders(device),
    )


def train(job: loop.Job, engine: Engine, what: str) -> dict[str, np.ndarray]:
    """Trains or resumes → the network's part of the refiner's state."""
    from pipeline.training import checkpoint, loop

    trained = job.work / "trained.safetensors"
    if not trained.exists():
        follow(loop.train(job, engine.launch()), engine, what)
    return {refiner_state.NETWORK + key: value.numpy() for key, value in checkpoint.read_tensors(trained).items()}


def write(path: Path, name: str, state: Mapping[str, np.ndarray], params: Any) -> None:
    """The refiner's state, its FitParams and, in words, what it learned from."""
    module = plugins.load("refiners", name)
    beside_tags = module.supervision(params) if isinstance(module, SupervisedRefiner) else None
    refiner_state.write(path, name, state, described(params), beside_tags)


def described(params: Any) -> str:
    """FitParams as JSON, from which refine builds the network again."""
    return json.dumps(dataclasses.asdict(params), sort_keys=True)
