"""What a stage of a run costs on this machine: measured on a small sample of the project's own images, kept in a file.

Each stage runs as DVC runs it, in a folder beside the project's results, on SAMPLE images of each split for every worker and
with STEPS steps of each phase of training; nothing that it computes is kept. What follows from the number of images is
then told apart from what does not by when parts and steps were done.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from pipeline.core import config, refiner_state, sections, store
from pipeline.core import records as records_file
from pipeline.core.config import PARAMS_FILE, Count, NonNegative, Positive, Share
from pipeline.core.contracts import Phase
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import SPLITS
from pipeline.core.records import Records
from pipeline.core.sections import Settings
from pipeline.training.epochs import ends_epoch

FILE = Path("rates.yaml")
FOLDER = Path(".work/rates")
PART = 8  # images of a part of the sample
PARTS = 3  # of each split, for every worker
STEPS = 8  # of each phase
STAGES = (
    "prepare", "train", "extract", "fit_refiner", "refine", "export", "cross_validate", "retrain", "segment", "relabel",
    "evaluate", "report",
)  # fmt: skip
SPLIT_OF = {  # of the images that a stage's results are of; those of the others are of both
    "fit_refiner": "train", "refine": "train", "export": "train", "cross_validate": "train", "segment": "val",
    "relabel": "train",
}  # fmt: skip
HEADER = """\
# What stages cost, for `plan`; nothing else reads it. Measured on a sample, or written by you: a GPU's `image` and `step`
# from its images per second, say. seconds: image: of one worker for an image; step: of a step of a phase, of all ranks;
# score: of the scores of an epoch's end; start: whatever the number of images.
"""


@dataclass(frozen=True)
class PhaseRate:
    """A phase of training, and what its steps cost. The other fields are those of contracts.Phase.

    ranks  that shared its shards as it was measured
    step   s of a step with so many ranks
    score  s of an epoch's end in which the weights are scored; 0 where they are not
    """

    epochs: NonNegative
    min_steps: Count
    batch_size: Positive
    shards: Positive
    ranks: Positive
    step: NonNegative
    score: NonNegative


@dataclass(frozen=True)
class Rate:
    """What a stage of a run costs.

    start            s, whatever the number of images
    image            by kind of work: s of one worker for an image
    phases           by name
    bytes            of its results, whatever the number of images
    bytes_per_image  of its results
    memory_mib       peak of its first process
    worker_mib       peak of each worker or further rank
    gpu              whether it computes on a GPU, where there is one
    """

    start: NonNegative
    image: dict[str, NonNegative]
    phases: dict[str, PhaseRate]
    bytes: NonNegative
    bytes_per_image: NonNegative
    memory_mib: NonNegative
    worker_mib: NonNegative
    gpu: bool


@dataclass(frozen=True)
class Rates:
    """Of a machine.

    host     its name
    device   torch device of networks
    images   of the sample, in each split at most
    train    fraction of the data set's images that are of split train
    runs     run → stage → rate
    """

    host: str
    device: str
    images: Positive
    train: Share
    runs: dict[str, dict[str, Rate]]


class Stages(Protocol):
    """How stages run. `pipeline.runtime` fills it."""

    def device(self) -> str: ...

    def workers(self, device: str = "cpu") -> int: ...

    def ranks(self, shards: int) -> int: ...

    def stage_command(self, name: str, folder: Path, timeline: Path) -> tuple[list[str], dict[str, str]]: ...

    def outs_of(self, name: str, folder: Path) -> list[Path]: ...

    def info(self, text: str, *values: object) -> None: ...


def read(path: Path) -> Rates:
    """ParamsError where the file is missing or wrong."""
    values = config.read(path)
    return config.parse(Rates, values, "rates", path)


def write(path: Path, rates: Rates) -> None:
    body = yaml.safe_dump(dataclasses.asdict(rates), sort_keys=False, width=125)
    path.write_text(HEADER + body, encoding="utf-8")


def measure(run: str, *, records: Path, truth: Path, stages: Stages) -> dict[str, Rate]:
    """Stage → its rate. ValueError where a stage fails on the sample, with its message. Takes minutes."""
    settings = Settings.read(run)
    sample = _sample(records_file.read(records), sample_size(stages))
    shutil.rmtree(FOLDER, ignore_errors=True)
    try:
        phases = _phases(settings, sample)
        _project(settings, sample, truth)
        rates = {"prepare": _of_prepare(records)}
        for stage in STAGES[1:]:
            if stage == "segment" and not sample.split("val"):
                continue
            rates[stage] = _of_stage(stage, run, sample, phases.get(stage, ()), stages)
        return rates
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


def sample_size(stages: Stages) -> int:
    """Images of each split that are measured on, at most: each worker goes through PARTS parts."""
    return PARTS * PART * max(stages.workers(), stages.workers(stages.device()))


def _sample(listed: Records, most: int) -> Records:
    """At most `most` images of each split."""
    images = [record for split in SPLITS for record in records_file.sample(listed.split(split), most)]
    return Records(listed.labels, tuple(sorted(images, key=lambda record: record.id)), ())


def _project(settings: Settings, sample: Records, truth: Path) -> None:
    """Writes a project of the run alone, on the sample and with short schedules, into FOLDER."""
    recipe, params = _shortened(settings, len(sample.split("train"))), dict(settings.params)
    params["dataset"] = {**params["dataset"], "root": str(settings.root.resolve())}
    params["methods"] = {settings.name: params["methods"][settings.name]}
    params["export"] = {**params["export"], "images_per_part": PART}
    for path, values in ((PARAMS_FILE, params), (settings.file, recipe)):
        target = FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    shutil.copy("dvc.yaml", FOLDER / "dvc.yaml")
    for init in {settings.run.init, settings.run.segmenter_init}:
        target = FOLDER / init
        if Path(init).is_absolute():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, target)
    records_file.write(FOLDER / "data/records.h5", sample)
    masks = store.Store(truth, store.TRUTH)
    items = ((record.id, masks[record.id]) for record in sample if record.id in masks)
    store.write_part(
        FOLDER / "data/truth.h5", store.TRUTH, items, labels=sample.labels, part=0, parts=1, params_digest="",
        compression="gzip",
    )  # fmt: skip
    (FOLDER / "data/corrections").mkdir(exist_ok=True)


def _shortened(settings: Settings, images: int) -> dict[str, Any]:
    """The run's recipe with small parts, and schedules that make STEPS steps of `images` images."""
    recipe = json.loads(json.dumps(settings.recipe))
    for name in ("extract", "refine", "segment"):
        recipe[name]["images_per_part"] = min(PART, recipe[name]["images_per_part"])
    for name in ("train", "fit_refiner", "retrain"):
        batch = (recipe[name].get("schedule") or {}).get("batch_size", 1)
        _shorten(recipe[name], images, batch)
    return recipe


def _shorten(values: Any, images: int, batch: int) -> None:
    for value in values.values() if isinstance(values, dict) else ():
        _shorten(value, images, batch)
    if isinstance(values, dict) and values.get("epochs"):
        values["epochs"] = STEPS * values.get("batch_size", batch) / images
        values["min_steps"] = 0


def _phases(settings: Settings, sample: Records) -> dict[str, Sequence[Phase]]:
    """Stage → phases of its training, as the recipe says; a network is built for it, so that no plug-in is asked by name.

    In a process of its own: a stage's peak of memory is never below that of the process that starts it, and torch is large.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_built_phases, settings, sample.labels).result()


def _built_phases(settings: Settings, labels: LabelSpace) -> dict[str, Sequence[Phase]]:
    from pipeline.jobs import fit_refiner, train
    from pipeline.jobs.refine import is_learned

    def of(kind: str, init: str) -> Sequence[Phase]:
        training, params = train.training_of(settings, kind)
        plugin = train.plugin_of(settings, kind)
        family = settings.run.backbone if kind == "methods" else plugin
        return train.build(kind, plugin, family, labels, training, params, Path(init)).phases()

    run = settings.run
    phases = {"train": of("methods", run.init), "retrain": of("segmenters", run.segmenter_init)}
    folds = settings.section(sections.CrossValidate, "cross_validate").folds
    phases["cross_validate"] = phases["retrain"] if folds else ()
    if is_learned(run.refiner):
        params = fit_refiner.params_of(settings)
        phases["fit_refiner"] = fit_refiner.build(run.refiner, params, run.backbone, Path(run.init)).phases()
    return phases


def _of_prepare(records: Path) -> Rate:
    """From what DVC's last run of it has left; nothing where there was none."""
    path, seconds, memory = Path("provenance/prepare.json"), 0.0, (0.0, 0.0)
    images = max(1, len(records_file.read(records)))
    if path.is_file():
        left = json.loads(path.read_text(encoding="utf-8"))
        seconds, memory = left["seconds"], (left["peak_memory_mib"], left["peak_memory_mib_largest_child"])
    size = records.stat().st_size + records.with_name("truth.h5").stat().st_size
    return Rate(2.0, {"prepare": seconds / images}, {}, 0.0, size / images, *memory, gpu=False)


def _of_stage(stage: str, run: str, sample: Records, phases: Sequence[Phase], stages: Stages) -> Rate:
    name = stage if stage == "report" else f"{stage}@{run}"
    timeline = FOLDER / f"{stage}.timeline"
    words, environment = stages.stage_command(name, FOLDER, timeline.resolve())
    stages.info("plan measures %s", name)
    started = time.monotonic()
    result = subprocess.run(words, cwd=FOLDER, env=environment, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - started
    if result.returncode:
        raise ValueError(f"{name} fails on a sample of the images: {result.stderr.rpartition('Error: ')[2].strip()}")
    gpu = bool(phases) or stage in ("extract", "segment", "relabel") or (stage == "refine" and _has_network(run))
    workers = stages.workers(stages.device() if gpu else "cpu")
    segments = list(_segments(timeline))
    image = {label: _of_image(events, workers) for label, noun, events in segments if noun == "images" and len(events) > 1}
    trainings = [events for _, noun, events in segments if noun == "steps" and len(events) > 1]
    of_phases = {}
    for phase in phases:
        step, scored = _of_steps(phase, trainings, len(sample.split("train")))
        of_phases[phase.name] = PhaseRate(
            phase.epochs, phase.min_steps, phase.batch_size, phase.shards, stages.ranks(phase.shards), step, scored
        )
    spent = sum(events[-1].seconds - events[1].seconds for events in trainings)  # the first step is warm-up
    spent += sum(
        image[label] * sum(event.count for event in events) / workers
        for label, noun, events in segments if noun == "images" and label in image
    )  # fmt: skip
    record = json.loads((FOLDER / f"provenance/{name}.json").read_text(encoding="utf-8"))
    fixed, growing = _sizes(stage, stages.outs_of(name, FOLDER))
    return Rate(
        start=round(max(0.0, seconds - spent), 3), image={label: _digits(value) for label, value in image.items()},
        phases=of_phases, bytes=fixed, bytes_per_image=round(growing / max(1, _images(stage, sample)), 1),
        memory_mib=record["peak_memory_mib"], worker_mib=record["peak_memory_mib_largest_child"],
        gpu=gpu,
    )  # fmt: skip


def _has_network(run: str) -> bool:
    return refiner_state.has_network(FOLDER / f"artifacts/{run}/refiner.safetensors")


def _images(stage: str, sample: Records) -> int:
    """How many images a stage's results are of."""
    return len(sample.split(SPLIT_OF[stage])) if stage in SPLIT_OF else len(sample)


def _sizes(stage: str, outs: Sequence[Path]) -> tuple[float, float]:
    """Bytes of results that do not grow with the images, and of those that do: stores, and what evaluate says of images.

    Pictures are of a bounded number of images: in the gallery, the report, and of a method's inside.
    """
    fixed = growing = 0
    for out in outs:
        size = sum(file.stat().st_size for file in ([out] if out.is_file() else out.rglob("*")) if file.is_file())
        of_images = out.is_dir() or stage in ("evaluate", "cross_validate")
        if of_images and stage != "report" and "gallery" not in out.relative_to(FOLDER).parts:
            growing += size
        else:
            fixed += size
    return float(fixed), float(growing)


@dataclass(frozen=True)
class Event:
    """count: images or steps that were done since the event before; note: of a step, which begins with its phase."""

    count: int
    note: str
    seconds: float


def _segments(timeline: Path) -> Iterator[tuple[str, str, list[Event]]]:
    """(label, noun, events) of each piece of work of a stage, in order; the first event is its start."""
    lines = [json.loads(line) for line in timeline.read_text("utf-8").splitlines()] if timeline.is_file() else []
    current: tuple[str, str, list[Event]] | None = None
    for line in lines:
        event = Event(line["count"], line["note"], line["seconds"])
        if current is None or event.count == 0:
            if current is not None:
                yield current
            current = line["what"].split(" ")[0], line["noun"], []
        current[2].append(event)
    if current is not None:
        yield current


def _of_image(events: Sequence[Event], workers: int) -> float:
    """s of one worker for an image: the first part of every worker, which waits for its start, does not count."""
    skipped = min(workers, len(events) - 2)
    seconds = events[-1].seconds - events[skipped].seconds
    images = sum(event.count for event in events[skipped + 1 :])
    return seconds * workers / max(1, images)


def _of_steps(phase: Phase, trainings: Sequence[Sequence[Event]], images: int) -> tuple[float, float]:
    """s of a step, and of the scoring that an epoch's end adds to it. The first step of a training does not count."""
    plain, scored = [], []
    for events in trainings:
        pairs = itertools.pairwise(events)
        own = [after.seconds - before.seconds for before, after in pairs if after.note.startswith(f"{phase.name} ")]
        short = dataclasses.replace(phase, epochs=len(own) * phase.batch_size / images, min_steps=0)
        for step, seconds in list(enumerate(own))[1:]:
            (scored if phase.keep_best and ends_epoch(short, step, images) else plain).append(seconds)
    step = _mean(plain or scored)
    return _digits(step), _digits(max(0.0, _mean(scored) - step)) if scored else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def _digits(value: float) -> float:
    """Four significant digits, for a file that people read."""
    return float(f"{value:.4g}")
