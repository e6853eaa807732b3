"""Stage report: metrics, curves and galleries of all runs → one page; and a page of the differences from a git revision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core import config, sections
from pipeline.core import records as records_file
from pipeline.report import compare, page


def run(values: Mapping[str, Any], paths: Mapping[str, Path]) -> None:
    """Writes the folder `report`. values: of params.yaml; paths: by the name of the stage's option."""
    inputs = page.Inputs(paths["metrics"], paths["plots"], paths["gallery"], paths["inspection"], paths["audit"])
    settings = config.parse(sections.Report, values["report"], "report")
    page.write(paths["report"], records_file.read(paths["records"]), sections.runs(values), inputs, settings)


def write_comparison(values: Mapping[str, Any], revision: str, paths: Mapping[str, Path]) -> Path:
    """Writes against.html beside the folder `report`, not inside it, since that is a cached out; returns its path."""
    report, read = paths["report"], compare.revision(revision)
    comparisons = compare.compare(sections.runs(values), paths["metrics"], paths["audit"], read)
    out = report.with_name("against.html")
    out.write_text(compare.render(revision, comparisons, f"{report.name}/index.html"), encoding="utf-8")
    return out
