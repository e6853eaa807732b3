"""The report from what is there, opened in the browser; or the changes since a git revision. No stage of the DAG."""

from __future__ import annotations

import webbrowser

import click

from pipeline import runtime
from pipeline.core import sections
from pipeline.jobs import report, show_report


@click.command()
@click.option("--open", "opens", is_flag=True, help="Opens the page in the browser.")
@click.option("--against", metavar="REV", help="A page of the changes since a git revision instead.")
def main(opens: bool, against: str | None) -> None:
    """Writes report/index.html of the runs that have been evaluated. Other runs are named as missing."""
    with runtime.stage():
        values, paths = sections.read(), runtime.command_paths("report")
        page = show_report.write(values, paths) if against is None else report.write_comparison(values, against, paths)
    uri = page.resolve().as_uri()
    click.echo(uri)
    if opens:
        webbrowser.open(uri)


if __name__ == "__main__":
    main()
