"""params.yaml and the recipes that it names → every mistake in them at once, before a long run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core import config, plugins, sections
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.core.sections import Settings
from pipeline.jobs import export, extract, fit_refiner, refine, segment, train


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
    found = Problems()
    values = found.of(lambda: sections.read(path))
    if values is None:
        return found
    dataset = found.of(lambda: sections.dataset(values))
    if dataset is not None:
        module = found.of(lambda: plugins.load("datasets", dataset.name))
        if module is not None:
            found.of(lambda: config.parse(module.Params, dataset.options, "dataset.options"))
    for name, kind in (("prepare", sections.Prepare), ("evaluate", sections.Evaluate), ("report", sections.Report)):
        found.of(lambda name=name, kind=kind: config.parse(kind, values[name], name))
    exported = found.of(lambda: config.parse(sections.Export, values["export"], "export"))
    if exported is not None:
        found.of(lambda: export.exporters(exported.formats))
    for name in found.of(lambda: sections.runs(values)) or () if dataset is not None else ():
        settings = found.of(lambda name=name: Settings.read(name, path))
        if settings is not None:
            found += [problem for problem in problems_of(settings) if problem not in found]  # two runs may share a recipe
    return found


def problems_of(settings: Settings) -> list[str]:
    """Everything in a run's recipe that some stage would refuse, its plug-ins included; [] if all is well."""
    found, run = Problems(), settings.run
    for name in (run.backbone, run.segmenter):
        found.of(lambda name=name: plugins.load("nn", name))
    found.of(lambda: train.training_of(settings, "methods"))
    found.of(lambda: train.training_of(settings, "segmenters"))
    extraction = found.of(lambda: settings.section(sections.Extract, "extract"))
    if extraction is not None:
        found.of(lambda: extract.options_of(settings, extraction))
    refinement = found.of(lambda: settings.section(sections.Refine, "refine"))
    if found.of(lambda: plugins.load("refiners", run.refiner)) is not None:
        fitted = found.of(lambda: fit_refiner.params_of(settings))
        if fitted is not None:
            found.of(lambda: fit_refiner.check(settings, fitted))
        if refinement is not None:
            found.of(lambda: refine.params_of(settings, refinement))
        if extraction is not None:
            found.of(lambda: _affinity_is_kept(settings, extraction))
    found.of(lambda: settings.section(sections.CrossValidate, "cross_validate"))
    segmentation = found.of(lambda: settings.section(sections.Segment, "segment"))
    if segmentation is not None:
        found.of(lambda: segment.crf_of(settings, segmentation))
        found.of(lambda: segment.options_of(settings, segmentation))
    return found


def _affinity_is_kept(settings: Settings, extraction: sections.Extract) -> None:
    refiner = settings.run.refiner
    if getattr(plugins.load("refiners", refiner), "NEEDS_AFFINITY", False) and not extraction.keep_affinity:
        raise ParamsError(
            f"{settings.file}: extract.keep_affinity: got false, allowed is true, since refiner {refiner} needs it "
            f"(edit {settings.file})"
        )
