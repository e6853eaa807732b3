"""Metrics and picture strips of all columns → report/index.html."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.audit import page
from pipeline.core import config, sections
from pipeline.core import records as records_file


@click.command()
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--metrics", type=click.Path(path_type=Path), required=True, help="Read: folder of <method>.json.")
@click.option("--strips", type=click.Path(path_type=Path), required=True, help="Read: folder of <method>.h5.")
@click.option("--inspection", type=click.Path(path_type=Path), required=True, help="Read: folder of <method>.h5.")
@click.option("--report", type=click.Path(path_type=Path), required=True, help="Written: folder with index.html.")
def main(records: Path, metrics: Path, strips: Path, inspection: Path, report: Path) -> None:
    """Writes one page for all columns: figures per stage, and pictures of the worst and of random images. No network is needed.

    Reads sections methods and report of params.yaml.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Report, values["report"], "report")
        found = page.read_metrics(metrics, list(values["methods"]))
        text = page.render(settings.title, records_file.read(records), found, strips, inspection, settings.strip_height)
        report.mkdir(parents=True, exist_ok=True)
        (report / "index.html").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
