"""Metrics, curves and galleries of all columns → report/index.html and review.csv; or what changed since a revision."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.audit import against as revisions
from pipeline.audit import page
from pipeline.core import config, sections
from pipeline.core import records as records_file

FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--records", type=FOLDER, help="Read: records.h5 of prepare.")
@click.option("--metrics", type=FOLDER, help="Read: folder of <method>.json.")
@click.option("--plots", type=FOLDER, help="Read: folder of <method>/threshold.csv.")
@click.option("--gallery", type=FOLDER, help="Read: folder of <method>.h5.")
@click.option("--inspection", type=FOLDER, help="Read: folder of <method>.h5.")
@click.option("--audit", type=FOLDER, help="Read: folder of <method>.csv, a row per image and stage.")
@click.option("--report", type=FOLDER, help="Written: folder with index.html and review.csv.")
@click.option(
    "--against", metavar="REV", help="Writes against.html beside the report instead: changes since a git revision."
)
def main(against: str | None, **paths: Path | None) -> None:
    """Writes one page for all columns: figures per stage, drawings, and a gallery of pictures. No network is needed.

    Reads sections methods and report of params.yaml. With --against, paths that are not given are those of dvc.yaml.
    """
    with runtime.stage():
        values = sections.read()
        methods = list(values["methods"])
        if against is not None:
            there = runtime.command_paths("report", Path("dvc.yaml"), config.PARAMS_FILE) | {
                k: v for k, v in paths.items() if v
            }
            found = revisions.compare(methods, there["metrics"], there["audit"], revisions.revision(against))
            out = there["report"].with_name("against.html")  # not inside the report, which is a cached out
            out.write_text(revisions.render(against, found, f"{there['report'].name}/index.html"), encoding="utf-8")
            click.echo(out)
            return
        read = {name: path for name, path in paths.items() if path is not None}
        missing = [f"--{name}" for name in paths if name not in read]
        if missing:
            raise click.UsageError(f"Missing {', '.join(missing)}.")
        settings = config.parse(sections.Report, values["report"], "report")
        inputs = page.Inputs(read["metrics"], read["plots"], read["gallery"], read["inspection"], read["audit"])
        page.write(read["report"], records_file.read(read["records"]), methods, inputs, settings)


if __name__ == "__main__":
    main()
