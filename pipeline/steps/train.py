"""Params + records → a training job for a method (tags) or a segmenter (pseudo-masks), and its run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.core import config, plugins, store
from pipeline.core import records as records_file
from pipeline.core.labels import LabelSpace
from pipeline.training import checkpoint, loop
from pipeline.training.data import TrainingImages, seed_of
from pipeline.training.settings import Training

SECTIONS = {"methods": "train", "segmenters": "retrain"}


def settings(values: Mapping[str, Any], kind: str, key: str, plugin: str) -> tuple[Training, Any]:
    """Section train.<m> or retrain.<m> and the plug-in's own Params. kind: methods or segmenters."""
    name = SECTIONS[kind]
    training = config.parse(Training, config.section(values, name, key), f"{name}.{key}")
    if kind == "segmenters" and (training.augment.rand_augment is not None or training.augment.erase > 0):
        raise config.ParamsError(
            f"{name}.{key}.augment: rand_augment must be null and erase 0, since masks would not follow (edit params.yaml)"
        )
    return training, config.parse(plugins.load(kind, plugin).Params, training.model, f"{name}.{key}.model")


def build(kind: str, plugin: str, family: str, labels: LabelSpace, training: Training, params: Any, init: Path) -> Any:
    """A Trainable with its initial weights, the same in every process. A top-level function, so that ranks can call it."""
    torch.manual_seed(seed_of("build", training.seed))
    module, backbones = plugins.load(kind, plugin), plugins.load("nn", family)
    make = module.Method if kind == "methods" else module.Segmenter
    trainable = make(labels, params, training.schedule, backbones)
    trainable.load_initial(backbones, init)
    return trainable


def job(
    values: Mapping[str, Any],
    *,
    kind: str,
    key: str,
    plugin: str,
    family: str,
    records: Path,
    init: Path,
    masks: Path | None,
    root: Path,
    code: Callable[[], str],
    device: str,
    loaders: int,
    ranks: Callable[[int], int],
) -> tuple[loop.Job, dict[str, str]]:
    """The job of one stage run and the metadata of its model. ValueError where nothing can be trained on.

    Tags train on the images that somebody tagged; masks train on exactly the images that have one.
    """
    training, params = settings(values, kind, key, plugin)
    plugins.load("nn", family)
    read = records_file.read(records)
    pseudo = None if masks is None else store.Store(masks, store.PSEUDO_MASKS)
    if pseudo is None:
        chosen = [record for record in read.split("train") if record.tags is not None]
    else:
        chosen = [record for record in read.split("train") if record.id in pseudo]
    if not chosen:
        raise ValueError(f"{records}: split train has no image with {'tags' if pseudo is None else 'a pseudo-mask'}")
    section = json.dumps(dataclasses.asdict(training), sort_keys=True)
    work_key = store.digest(
        {
            "code": code(),  # asked now that the plug-ins are imported
            "records": store.file_digest(records),
            "init": store.file_digest(init),
            "masks": pseudo and pseudo.logical_digest,
            "section": section,
            "family": family,
            "plugin": plugin,
        }
    )
    made = loop.Job(
        build=partial(build, kind, plugin, family, read.labels, training, params, init),
        images=TrainingImages(chosen, root, len(read.labels), training.augment, training.seed, pseudo),
        seed=training.seed,
        precision=training.precision,
        work=Path(".work") / work_key[:32],
        device=device,
        ranks=ranks(training.schedule.shards),
        loaders=loaders,
    )
    return made, {"plugin": plugin, "labels": json.dumps(read.labels.names), "section": section}


def without(made: loop.Job, held_out: Collection[str]) -> loop.Job:
    """The same job on all its images but these ids, in a work space of its own."""
    out = set(held_out)
    left = [record for record in made.images.records if record.id not in out]
    work_key = store.digest([made.work.name, [record.id for record in left]])
    images = dataclasses.replace(made.images, records=left)
    return dataclasses.replace(made, images=images, work=made.work.with_name(work_key[:32]))


def run(
    made: loop.Job,
    metadata: Mapping[str, str],
    *,
    model: Path,
    log: Path,
    progress: Callable[[Iterator[str], int], Iterable[str]],
) -> None:
    """Trains or resumes, then puts model and log into place and empties the work space."""
    with store.Workspace(model, made.work.name) as work:
        trained = made.work / "trained.safetensors"
        if not trained.exists():
            training = loop.train(made)
            for _ in progress(training.notes, training.steps):
                pass
        checkpoint.save_tensors(work.result / model.name, checkpoint.read_tensors(trained), metadata)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes((made.work / "log.csv").read_bytes())
