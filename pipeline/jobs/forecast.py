"""Number of images + settings of a run + speed of this machine → how long its chain of stages will take, roughly.

The constants are CPU-seconds measured in November 2026 on two cores, where `_speed` is 1. Nothing of it enters an artefact.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core import config
from pipeline.core.contracts import Phase
from pipeline.core.sections import CrossValidate, Extract, Relabel, Segment, Settings
from pipeline.training.epochs import step_count, too_few_steps
from pipeline.training.settings import Schedule, Training

PHOTOGRAPH = (375, 500)  # px (H, W), where nobody says how large the images are
LOW, HIGH = 0.6, 2.0  # times the estimate: methods differ in their losses, machines in their memory
START = 5.0  # s of a stage: imports, and DVC's own work

REFERENCE = 0.18  # CPU-seconds of `_load`, where the constants were measured
TRAINED = 0.095  # CPU-seconds of an image of 224 px through DeiT-Tiny, forwards and backwards
FORWARD = TRAINED / 3
SEGMENTER = 1.3  # a segmenter with its decoder over its backbone
PER_PIXEL = {"prepare": 0.02e-6, "refine": 2.2e-6, "export": 0.03e-6, "evaluate": 0.5e-6}  # CPU-seconds
PER_IMAGE = {"prepare": 0.005, "refine": 0.0, "export": 0.002, "evaluate": 0.02}

DEIT_TINY = 5.5 * (224 / 16) ** 2  # million parameters × cells
# million parameters by a part of the architecture's name, the first that fits; the demo's small ones count for more than
# they have, since their matrices are too small to be fast
PARAMETERS = {
    "scenes_": 2.0, "tiny": 5.5, "small": 22.0, "large": 304.0, "base": 86.0, "resnet18": 11.0, "resnet34": 21.0,
    "resnet50": 25.0, "resnet101": 44.0, "resnet38d": 105.0, "b0": 3.7, "b1": 13.7, "b2": 25.0, "b3": 45.0, "b4": 63.0,
    "b5": 82.0, "lite0": 4.7,
}  # fmt: skip
UNKNOWN = 25.0
STRIDES = {"scenes_": 8}  # of a cell, where it is not 16


@dataclass(frozen=True)
class Forecast:
    """stages    stage → (least, most) seconds
    cores     that the work is shared out to
    warnings  trainings that would learn nothing
    """

    run: str
    stages: Mapping[str, tuple[float, float]]
    cores: int
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> tuple[float, float]:
        """(least, most) of the whole chain, prepare included."""
        return sum(low for low, _ in self.stages.values()), sum(high for _, high in self.stages.values())

    def text(self) -> str:
        """One line: the whole chain, and the stages that take longest."""
        longest = sorted(self.stages, key=lambda stage: -self.stages[stage][1])[:3]
        parts = ", ".join(f"{stage} {_duration(*self.stages[stage])}" for stage in longest)
        cores = f"{self.cores} core{'s' * (self.cores != 1)}"
        return f"{self.run}: about {_duration(*self.seconds)} on {cores} ({parts}); a GPU takes less"


def of(
    images_train: int, images_val: int, settings: Settings, *, size: tuple[int, int] = PHOTOGRAPH, cores: int | None = None
) -> Forecast:
    """size: (H, W) px of a usual image; cores: those of this process where None. Takes under 3 seconds, mostly to measure.

    ParamsError where the recipe is wrong.
    """
    used = cores or len(os.sched_getaffinity(0))
    work, warnings = _work(images_train, images_val, settings, size)
    estimates = {stage: START + seconds * _speed() / used for stage, seconds in work.items()}
    stages = {stage: (LOW * seconds, HIGH * seconds) for stage, seconds in estimates.items()}
    return Forecast(settings.name, stages, used, tuple(warnings))


def _work(train: int, val: int, settings: Settings, size: tuple[int, int]) -> tuple[dict[str, float], list[str]]:
    """CPU-seconds by stage where `_speed` is 1, and warnings."""
    pixels = size[0] * size[1]
    training, retraining = settings.section(Training, "train"), settings.section(Training, "retrain")
    extract, segment = settings.section(Extract, "extract"), settings.section(Segment, "segment")
    folds = settings.section(CrossValidate, "cross_validate").folds
    phases = {
        "train": list(_phases(training.model, training.schedule)),
        "fit_refiner": list(_phases(settings.recipe["fit_refiner"], None)),
        "retrain": [retraining.schedule.phase("retrain")],
    }
    sizes = {name: settings.recipe[name].get("augment", {}).get("size", 0) for name in phases}
    method, segmenter = _cost(training.model, FORWARD), SEGMENTER * _cost(retraining.model, FORWARD)
    shown = {name: sum(step_count(phase, train) * phase.batch_size for phase in phases[name]) for name in phases}
    trained = {name: 3 * images * sizes[name] ** 2 for name, images in shown.items()}
    segmented = _views(segment.scales, segment.flip) * (size[0] * size[1]) * segmenter
    seconds = {
        "prepare": _plain("prepare", train + val, pixels),
        "train": trained["train"] * method,
        "extract": (train + val) * pixels * _views(extract.scales, extract.flip) * method,
        "fit_refiner": trained["fit_refiner"] * method,
        "refine": _plain("refine", train, pixels),
        "export": _plain("export", train, pixels),
        "cross_validate": folds * trained["retrain"] * segmenter + (train * segmented if folds else 0),
        "retrain": trained["retrain"] * segmenter,
        "segment": val * segmented,
        "relabel": train * segmented if settings.section(Relabel, "relabel").enabled else 0,
        "evaluate": _plain("evaluate", train + val, pixels),
        "report": 0.0,
    }
    few = {name: too_few_steps(of_section, train) for name, of_section in phases.items() if of_section}
    return seconds, [f"{settings.file}: {name}: {warning}" for name, warning in few.items() if warning]


def _phases(section: Any, main: Schedule | None) -> Iterator[Phase]:
    """The main schedule, and those that lie anywhere within a section."""
    if main is not None:
        yield main.phase("main")
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if key == "schedule":
            yield config.parse(Schedule, value, key).phase(key)
        elif key == "warm_head" and value is not None and main is not None:
            yield Phase(**{**vars(main.phase(key)), "epochs": value["epochs"], "min_steps": value["min_steps"]})
        else:
            yield from _phases(value, None)


def _cost(model: Mapping[str, Any], of_deit: float) -> float:
    """CPU-seconds of a pixel through a network, forwards, from those of an image of 224 px through DeiT-Tiny."""
    name = str(model.get("architecture", model.get("encoder", "")))
    million = next((value for part, value in PARAMETERS.items() if part in name), UNKNOWN)
    stride = next((value for part, value in STRIDES.items() if name.startswith(part)), 16)
    return of_deit * million / stride**2 / DEIT_TINY


def _views(scales: tuple[float, ...], flip: bool) -> float:
    """Pixels of all views over those of the image."""
    return sum(scale**2 for scale in scales) * (2 if flip else 1)


def _plain(stage: str, images: int, pixels: int) -> float:
    return images * (PER_IMAGE[stage] + PER_PIXEL[stage] * pixels)


@functools.cache
def _speed() -> float:
    """CPU-seconds of a small load here over REFERENCE: above 1 on a slower machine. Other programs hardly change it."""
    rng = np.random.default_rng(0)
    images, up, down = (rng.random(shape, np.float32) for shape in ((1576, 192), (192, 768), (768, 192)))
    result = np.empty_like(images)

    def load() -> float:
        started = time.process_time()
        for _ in range(12):
            np.matmul(np.maximum(images @ up, 0), down, out=result)
        return time.process_time() - started

    return min(load() for _ in range(4)) / REFERENCE


def _duration(low: float, high: float) -> str:
    """In words, rounded outwards: 20-40 minutes."""
    unit, seconds = ("seconds", 1) if high < 120 else ("minutes", 60) if high < 7200 else ("hours", 3600)
    least, most = max(1, int(low / seconds)), max(1, -int(-high // seconds))
    return f"{least}-{most} {unit}" if least < most else f"{most} {unit if most > 1 else unit.removesuffix('s')}"
