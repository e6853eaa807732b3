"""params.yaml → nothing, or every mistake in it at once. Run by train, `make doctor` and by hand before a long run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from pipeline.core import config, plugins, sections
from pipeline.core.config import PARAMS_FILE, ParamsError
from pipeline.steps import export, extract, fit_refiner, segment, train


def problems(path: Path = PARAMS_FILE) -> list[str]:
    """Everything in the file that some stage would refuse; [] if all is well."""
    found: list[str] = []

    def tried(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except (ParamsError, ValueError) as error:
            found.append(str(error))
            return None

    values = tried(lambda: sections.read(path))
    if values is None:
        return found
    dataset = tried(lambda: sections.dataset(values))
    if dataset is not None:
        module = tried(lambda: plugins.load("datasets", dataset.name))
        if module is not None:
            tried(lambda: config.parse(module.Params, dataset.options, "dataset.options"))
    for name, kind in (("prepare", sections.Prepare), ("evaluate", sections.Evaluate), ("report", sections.Report)):
        tried(lambda name=name, kind=kind: config.parse(kind, values[name], name))
    methods = values["methods"] if isinstance(values["methods"], dict) else {}
    if not methods:
        found.append(f"{path}: methods must name at least one column")
    for section in sections.OF_COLUMNS:
        extra = sorted(set(values[section] or {}) - set(methods))
        if extra:
            found.append(f"{path}: {section} has {', '.join(extra)}, which `methods` does not name (edit {path})")
    for key in methods:
        _check_column(values, key, tried)
    return found


def _check_column(values: dict[str, Any], key: str, tried: Callable[[Callable[[], Any]], Any]) -> None:
    column = tried(lambda: sections.column(values, key))
    if column is None:
        return

    def parsed(kind: type[Any], section: str) -> Any:
        return tried(lambda: config.parse(kind, config.section(values, section, key), f"{section}.{key}"))

    for kind, name in (("nn", column.backbone), ("nn", column.segmenter)):
        tried(lambda kind=kind, name=name: plugins.load(kind, name))
    tried(lambda: train.settings(values, "methods", key, key))
    tried(lambda: train.settings(values, "segmenters", key, column.segmenter))
    extraction = parsed(sections.Extract, "extract")
    if extraction is not None:
        tried(lambda: extract.options_of(key, extraction))
    refiner = tried(lambda: plugins.load("refiners", column.refiner))
    refine = parsed(sections.Refine, "refine")
    if refiner is not None:
        fitted = parsed(refiner.FitParams, "fit_refiner")
        if fitted is not None:
            tried(lambda: fit_refiner.check(column.refiner, fitted, f"fit_refiner.{key}"))
        if refine is not None:
            tried(lambda: config.parse(refiner.Params, refine.options, f"refine.{key}.options"))
        if extraction is not None:
            tried(lambda: _affinity_is_kept(refiner, column.refiner, extraction, key))
    exported = parsed(sections.Export, "export")
    if exported is not None:
        tried(lambda: export.exporters(exported.formats))
    parsed(sections.CrossValidate, "cross_validate")
    segmentation = parsed(sections.Segment, "segment")
    if segmentation is not None:
        tried(lambda: segment.crf_of(segmentation, key))
        tried(lambda: segment.options_of(column.segmenter, segmentation, key))


def _affinity_is_kept(refiner: Any, name: str, extraction: sections.Extract, key: str) -> None:
    if getattr(refiner, "NEEDS_AFFINITY", False) and not extraction.keep_affinity:
        raise ParamsError(
            f"extract.{key}.keep_affinity: got false, allowed is true, since refiner {name} needs it (edit params.yaml)"
        )


@click.command()
@click.option(
    "--params", type=click.Path(path_type=Path), default=PARAMS_FILE, show_default=True, help="Read: the file to check."
)
def main(params: Path) -> None:
    """Checks every section of params.yaml for every column, strictly, and lists all mistakes."""
    found = problems(params)
    if found:
        raise click.ClickException("\n".join(found))
    click.echo(f"{params} is well")


if __name__ == "__main__":
    main()
