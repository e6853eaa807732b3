"""Score maps → what a learned refiner learns from, and its training. `fit`, which every refiner has, is called by steps/refine.

Torch is imported where it is needed, since the stage fits those without it as well.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.core import plugins, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, read_image
from pipeline.steps.refine import has_network, maps_of, network_state

if TYPE_CHECKING:
    from pipeline.training import loop

LABELS_PER_PART = 64


@dataclass(frozen=True)
class LabelJob:
    """All that one process needs to make labels, picklable."""

    refiner: str
    params: Any  # the refiner's FitParams
    level: float
    scoremaps: Path
    root: Path
    labels: LabelSpace
    parts: int
    digest: str
    out: Path


def check(name: str, params: Any, where: str) -> None:
    """ValueError if a learned refiner's augmentation would change pixels whose labels do not follow, or the refiner says no."""
    refiner = plugins.load("refiners", name)
    if hasattr(refiner, "check"):
        refiner.check(params)
    if has_network(name) and (params.augment.rand_augment is not None or params.augment.erase > 0):
        raise ValueError(
            f"{where}.augment: rand_augment must be null and erase 0, since labels would not follow (edit params.yaml)"
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
            yield record.id, {"mask": make(job.params, image, maps, job.level)}

    store.write_part(
        store.part_path(job.out, part), store.PSEUDO_MASKS, items(), labels=job.labels, part=part, parts=job.parts,
        params_digest=job.digest, compression="gzip",
    )  # fmt: skip
    return len(records)


def build(name: str, params: Any, family: str, init: Path) -> Any:
    """The network with its initial weights, the same in every process. A top-level function, so that ranks can call it."""
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
    ranks: Callable[[int], int],
    loaders: int,
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
        ranks=ranks(params.schedule.shards),
        loaders=loaders,
    )


def train(job: loop.Job, progress: Callable[[Iterator[str], int], Iterable[str]]) -> dict[str, np.ndarray]:
    """Trains or resumes → the network's part of the refiner's state."""
    from pipeline.training import checkpoint, loop

    trained = job.work / "trained.safetensors"
    if not trained.exists():
        run = loop.train(job)
        for _ in progress(run.notes, run.steps):
            pass
    return network_state(checkpoint.read_tensors(trained))


def described(params: Any) -> str:
    """FitParams as JSON, from which refine builds the network again."""
    return json.dumps(dataclasses.asdict(params), sort_keys=True)
