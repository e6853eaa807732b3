"""params.yaml and the recipes that it names → every mistake in them, every file that is missing, and what would be learned,
at once, before a long run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.core import config, plugins, sections
from pipeline.core import records as records_file
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.core.contracts import AffinityMethod, AffinityRefiner
from pipeline.core.sections import Settings
from pipeline.jobs import export, extract, fit_refiner, refine, relabel, segment, train
from pipeline.training import precision
from pipeline.training.epochs import too_few_steps


class Problems(list[str]):
    """What checks have refused, as texts."""

    def of(self, check: Callable[[], Any]) -> Any:
        """What the check returns, or None where it refuses."""
        try:
            return check()
        except (ParamsError, ValueError) as error:
            self.append(str(error))
            return None


def problems(path: Path = PARAMS_FILE) -> list[str]:
    """Everything in params.yaml and in its recipes that some stage would refuse; [] if all is well."""
    refused = Problems()
    values = refused.of(lambda: sections.read(path))
    if values is None:
        return refused
    dataset = refused.of(lambda: sections.dataset(values))
    if dataset is not None:
        module = refused.of(lambda: plugins.load("datasets", dataset.name))
        if module is not None:
            refused.of(lambda: config.parse(module.Params, dataset.options, "dataset.options"))
    for name, kind in (("prepare", sections.Prepare), ("evaluate", sections.Evaluate), ("report", sections.Report)):
        refused.of(lambda name=name, kind=kind: config.parse(kind, values[name], name))
    exported = refused.of(lambda: config.parse(sections.Export, values["export"], "export"))
    if exported is not None:
        refused.of(lambda: export.exporters(exported.formats))
    names = refused.of(lambda: sections.runs(values)) or []
    for name in names if dataset is not None else ():
        settings = refused.of(lambda name=name: Settings.read(name, path))
        if settings is not None:  # two runs may share a recipe
            refused += [problem for problem in problems_of(settings) if problem not in refused]
    return refused


def missing_files(path: Path = PARAMS_FILE, only: str | None = None) -> list[str]:
    """What dataset.root and the runs name and is not there, each with where to get it. only: a run; null: all.

    [] where params.yaml itself is wrong: `problems` says so.
    """
    try:
        values = sections.read(path)
        root, names = Path(sections.dataset(values).root), sections.runs(values)
        runs = {name: Settings.read(name, path).run for name in names if only in (None, name)}
    except ParamsError:
        return []
    problems = []
    if not root.is_dir():
        problems.append(f"dataset.root {root} is no folder; edit {path} (`make data` draws the scenes of the demo)")
    named: dict[Path, list[str]] = {}  # two runs may start from the same file
    for name, run in runs.items():
        for key in ("init", "segmenter_init"):
            named.setdefault(Path(getattr(run, key)), []).append(f"methods.{name}.{key}")
    return problems + [problem for file, keys in named.items() if (problem := _absence(file, keys, names, path))]


def _absence(file: Path, keys: Sequence[str], runs: Sequence[str], params: Path) -> str | None:
    """None for a file that is there, or that a run of the same params.yaml makes."""
    if file.is_file():
        return None
    asked = f"{', '.join(keys)}: there is no file {file}"
    if file.parts[:1] == ("artifacts",):
        maker = file.parts[1] if len(file.parts) > 2 else ""
        if maker in runs:
            return None
        return f"{asked}, which run {maker!r} would make; add it to methods of {params} (there: {', '.join(runs)})"
    name = file.name.split(".")[0]
    return f"{asked}; get it with `tag2mask weights get {name}` (data/weights/README.md), or name another in {params}"


def warnings(path: Path, records: Path) -> list[str]:
    """Trainings that would learn nothing, by the number of training images: of prepare's records, or else of the lists of
    the data set. [] where it is not known, or where params.yaml or a recipe is wrong."""
    try:
        values = sections.read(path)
        images = _training_images(values, records)
        runs = [Settings.read(name, path) for name in sections.runs(values)]
        found = [warning for settings in runs for warning in warnings_of(settings, images)] if images else []
    except (ParamsError, ValueError, OSError):  # `problems` says so, or prepare will
        return []
    return list(dict.fromkeys(found))


def warnings_of(settings: Settings, images: int) -> list[str]:
    """Those of one run, on so many training images. Phases beside the main schedule of a section are not counted."""
    schedules = {
        "train": train.training_of(settings, "methods")[0].schedule,
        "fit_refiner": getattr(fit_refiner.params_of(settings), "schedule", None),  # of refiners that learn
        "retrain": train.training_of(settings, "segmenters")[0].schedule,
    }
    few = {name: too_few_steps([schedule.phase(name)], images) for name, schedule in schedules.items() if schedule}
    return [f"{settings.file}: {name}: {warning}" for name, warning in few.items() if warning]


def processor() -> tuple[str, str]:
    """Torch device that networks run on here, and what to call it."""
    return ("cuda", "GPU") if torch.cuda.is_available() else ("cpu", "processor")


def slow_precisions(path: Path = PARAMS_FILE) -> list[str]:
    """A text per section of a recipe whose precision this machine only emulates; [] where some file is wrong."""
    device, where = processor()
    try:
        runs = [Settings.read(name, path) for name in sections.runs(sections.read(path))]
    except ParamsError:
        return []
    texts = dict[str, None]()
    for settings in runs:
        for name, section in settings.recipe.items():
            chosen = section.get("precision", "fp32") if isinstance(section, Mapping) else "fp32"
            if chosen in precision.AUTOCAST and not precision.is_fast(chosen, device):
                texts[
                    f"{settings.file}: {name}.precision is {chosen}, which this {where} only emulates: fp32 is faster here, "
                    "with other results in the last bits"
                ] = None
    return list(texts)


def _training_images(values: Mapping[str, Any], records: Path) -> int:
    """Images of split train; 0 where nothing is there to count."""
    if records.is_file():
        return len(records_file.read(records).split("train"))
    dataset = sections.dataset(values)
    if not Path(dataset.root).is_dir():
        return 0
    module = plugins.load("datasets", dataset.name)
    options = config.parse(module.Params, dataset.options, "dataset.options")
    return sum(listing.split == "train" for listing in module.Dataset(Path(dataset.root), options).listings())


def problems_of(settings: Settings) -> list[str]:
    """Everything in a run's recipe that some stage would refuse, its plug-ins included; [] if all is well."""
    refused, run = Problems(), settings.run
    for name in (run.backbone, run.segmenter):
        refused.of(lambda name=name: plugins.load("nn", name))
    refused.of(lambda: train.training_of(settings, "methods"))
    refused.of(lambda: train.training_of(settings, "segmenters"))
    extraction = refused.of(lambda: settings.section(sections.Extract, "extract"))
    if extraction is not None:
        refused.of(lambda: extract.options_of(settings, extraction))
    refinement = refused.of(lambda: settings.section(sections.Refine, "refine"))
    if refused.of(lambda: plugins.load("refiners", run.refiner)) is not None:
        fitted = refused.of(lambda: fit_refiner.params_of(settings))
        if fitted is not None:
            refused.of(lambda: fit_refiner.check(settings, fitted))
        if refinement is not None:
            refused.of(lambda: refine.params_of(settings, refinement))
        if extraction is not None:
            refused.of(lambda: _affinity_is_kept(settings, extraction))
    refused.of(lambda: settings.section(sections.CrossValidate, "cross_validate"))
    segmentation = refused.of(lambda: settings.section(sections.Segment, "segment"))
    if segmentation is not None:
        refused.of(lambda: segment.crf_of(settings, segmentation))
        refused.of(lambda: segment.options_of(settings, segmentation))
    relabelling = refused.of(lambda: settings.section(sections.Relabel, "relabel"))
    if relabelling is not None:
        refused.of(lambda: relabel.crf_of(settings, relabelling))
    return refused


def _affinity_is_kept(settings: Settings, extraction: sections.Extract) -> None:
    """ParamsError where the method has none to keep, or the refiner needs one that is not kept."""
    refiner, method = settings.run.refiner, settings.run.method
    module = plugins.load("refiners", refiner)
    if extraction.keep_affinity and not isinstance(plugins.load("methods", method), AffinityMethod):
        raise ParamsError(
            f"{settings.file}: extract.keep_affinity: got true, allowed is false, since method {method} has no affinity "
            f"(edit {settings.file})"
        )
    if isinstance(module, AffinityRefiner) and module.NEEDS_AFFINITY and not extraction.keep_affinity:
        raise ParamsError(
            f"{settings.file}: extract.keep_affinity: got false, allowed is true, since refiner {refiner} needs it "
            f"(edit {settings.file})"
        )
