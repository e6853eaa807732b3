"""Stage report: figures, curves and galleries of the runs → one page; and a page of the differences from a git revision."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import config, sections
from pipeline.report import available, compare, history, out_of_date, page

PROVENANCE = "provenance"  # folder beside the report, from which its page reads what differs from run to run


def run(values: Mapping[str, Any], paths: Mapping[str, Path], outdated: Collection[str] = ()) -> Path:
    """Writes the folder `report` of the runs that are there, and the history of their figures; returns the page's path.

    values    of params.yaml
    paths     by the name of the stage's option
    outdated  names of runs that the page marks as out of date, from `outdated_runs`
    """
    inputs = available.Inputs(
        records=paths["records"], audit=paths["audit"], metrics=paths["metrics"], plots=paths["plots"],
        gallery=paths["gallery"], inspection=paths["inspection"],
    )  # fmt: skip
    settings = config.parse(sections.Report, values["report"], "report")
    runs = list(sections.runs(values))
    written = page.write(paths["report"], inputs, runs, settings, outdated)
    history.write(paths["report"].with_name(PROVENANCE) / "history.js", paths["metrics"], runs)
    return written


def outdated_runs(values: Mapping[str, Any]) -> set[str]:
    """Runs of params.yaml that DVC would run again."""
    return out_of_date.runs(list(sections.runs(values)))


def write_comparison(values: Mapping[str, Any], revision: str, paths: Mapping[str, Path]) -> tuple[Path, Mapping[str, str]]:
    """Writes against.html beside the folder `report`, not inside it, since that is a cached out.

    Returns its path, and run → how its data differ from those of the revision, where they do.
    """
    report, read = paths["report"], compare.revision(revision)
    comparisons = compare.compare(sections.runs(values), paths["metrics"], paths["audit"], read)
    out = report.with_name("against.html")
    out.write_text(compare.render(revision, comparisons, f"{report.name}/index.html"), encoding="utf-8")
    return out, {method: of_run.data for method, of_run in comparisons.items() if of_run is not None and of_run.data}
