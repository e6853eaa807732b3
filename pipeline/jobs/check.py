"""params.yaml and the recipes that it names → every mistake in them at once, before a long run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.core import config, plugins, sections
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.core.contracts import AffinityMethod, AffinityRefiner
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
