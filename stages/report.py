"""Metrics, curves and galleries of all columns → report/index.html and report/review.csv."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.audit import page
from pipeline.core import config, sections
from pipeline.core import records as records_file

FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--records", type=FOLDER, required=True, help="Read: records.h5 of prepare.")
@click.option("--metrics", type=FOLDER, required=True, help="Read: folder of <method>.json.")
@click.option("--plots", type=FOLDER, required=True, help="Read: folder of <method>/threshold.csv.")
@click.option("--gallery", type=FOLDER, required=True, help="Read: folder of <method>.h5.")
@click.option("--inspection", type=FOLDER, required=True, help="Read: folder of <method>.h5.")
@click.option("--audit", type=FOLDER, default=None, help="Read: folder of <method>.csv, a row per image and stage.")
@click.option("--report", type=FOLDER, required=True, help="Written: folder with index.html and review.csv.")
def main(
    records: Path, metrics: Path, plots: Path, gallery: Path, inspection: Path, audit: Path | None, report: Path
) -> None:
    """Writes one page for all columns: figures per stage, drawings, and a gallery of pictures. No network is needed.

    Reads sections methods and report of params.yaml.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Report, values["report"], "report")
        inputs = page.Inputs(metrics, plots, gallery, inspection, audit)
        page.write(report, records_file.read(records), list(values["methods"]), inputs, settings)


if __name__ == "__main__":
    main()
