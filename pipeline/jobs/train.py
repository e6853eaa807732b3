"""Params + records → a training job for a method (tags) or a segmenter (pseudo-masks), and its run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.core import config, plugins, store
from pipeline.core import records as records_file
from pipeline.core.ids import Ids
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import RecordTable
from pipeline.core.sections import Settings
from pipeline.jobs.engine import Engine
from pipeline.jobs.training_run import follow
from pipeline.training import checkpoint, loop
from pipeline.training.data import TrainingImages, seed_of
from pipeline.training.settings import Training

SECTIONS = {"methods": "train", "segmenters": "retrain"}


def training_of(settings: Settings, kind: str) -> tuple[Training, Any]:
    """Section train or retrain and the plug-in's own Params. kind: methods or segmenters."""
    name = SECTIONS[kind]
    training = settings.section(Training, name)
    if kind == "segmenters" and (training.augment.rand_augment is not None or training.augment.erase > 0):
        raise config.ParamsError(
            f"{settings.file}: {name}.augment: rand_augment must be null and erase 0, since masks would not follow "
            f"(edit {settings.file})"
        )
    return training, settings.part(plugins.load(kind, plugin_of(settings, kind)).Params, training.model, f"{name}.model")


def plugin_of(settings: Settings, kind: str) -> str:
    """The run's method or segmenter."""
    return settings.run.method if kind == "methods" else settings.run.segmenter


def build(kind: str, plugin: str, family: str, labels: LabelSpace, training: Training, params: Any, init: Path) -> Any:
    """A Trainable with its initial weights, the same in every process. A top-level function, so that ranks can call it."""
    torch.manual_seed(seed_of("build", training.seed))
    module, backbones = plugins.load(kind, plugin), plugins.load("nn", family)
    make = module.Method if kind == "methods" else module.Segmenter
    trainable = make(labels, params, training.schedule, backbones)
    trainable.load_initial(backbones, init)
    return trainable


def job(
    settings: Settings, kind: str, *, records: Path, init: Path, masks: Path | None, engine: Engine
) -> tuple[loop.Job, dict[str, str]]:
    """The job of one stage run and the metadata of its model. kind: methods or segmenters. ValueError where nothing can be
    trained on.

    Tags train on the images that somebody tagged; masks train on exactly the images that have one.
    """
    training, params = training_of(settings, kind)
    plugin = plugin_of(settings, kind)
    family = settings.run.backbone if kind == "methods" else plugin
    plugins.load("nn", family)
    read = records_file.read(records)
    pseudo = None if masks is None else store.Store(masks, store.PSEUDO_MASKS)
    train_images = read.split("train")
    chosen = train_images.tagged() if pseudo is None else train_images.among(pseudo.ids)
    if not chosen:
        raise ValueError(f"{records}: split train has no image with {'tags' if pseudo is None else 'a pseudo-mask'}")
    section = json.dumps(dataclasses.asdict(training), sort_keys=True)
    work_key = store.digest(
        {
            "code": engine.code_digest(),  # asked now that the plug-ins are imported
            "records": store.file_digest(records),
            "init": store.file_digest(init),
            "masks": pseudo and pseudo.logical_digest,
            "section": section,
            "family": family,
            "plugin": plugin,
        }
    )
    device = engine.device()
    made = loop.Job(
        build=partial(build, kind, plugin, family, read.labels, training, params, init),
        images=TrainingImages(chosen, settings.root, len(read.labels), training.augment, training.seed, pseudo),
        seed=training.seed,
        precision=training.precision,
        work=Path(".work") / work_key[:32],
        device=device,
        ranks=engine.ranks(training.schedule.shards),
        loaders=engine.loaders(device),
    )
    return made, {"plugin": plugin, "labels": json.dumps(read.labels.names), "section": section}


def without(made: loop.Job, held_out: Collection[str]) -> loop.Job:
    """The same job on all its images but these ids, in a work space of its own."""
    left = RecordTable.of(made.images.records).without(Ids.of(held_out))
    work_key = store.digest([made.work.name, list(left.ids)])
    images = dataclasses.replace(made.images, records=left)
    return dataclasses.replace(made, images=images, work=made.work.with_name(work_key[:32]))


def run(
    settings: Settings, kind: str, *, records: Path, init: Path, masks: Path | None, model: Path, log: Path, engine: Engine
) -> None:
    """Stages train (kind methods) and retrain (kind segmenters, with `masks`)."""
    made, metadata = job(settings, kind, records=records, init=init, masks=masks, engine=engine)
    train(made, metadata, model=model, log=log, engine=engine, what=f"{SECTIONS[kind]} {settings.name}")


def train(made: loop.Job, metadata: Mapping[str, str], *, model: Path, log: Path, engine: Engine, what: str) -> None:
    """Trains or resumes, then puts model and log into place and empties the work space."""
    with store.Workspace(model, made.work.name) as work:
        trained = made.work / "trained.safetensors"
        if not trained.exists():
            follow(loop.train(made, engine.launch()), engine, what)
        checkpoint.save_tensors(work.result / model.name, checkpoint.read_tensors(trained), metadata)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes((made.work / "log.csv").read_bytes())
