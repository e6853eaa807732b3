"""A run's pseudo-masks → formats of other tools, into any folder. No stage of the DAG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core import plugins, records
from pipeline.jobs import export

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.argument("formats", nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="Written: a folder per format.")
def main(run: str, formats: tuple[str, ...], out: Path) -> None:
    """Writes the pseudo-masks of RUN in FORMATS: {formats}.

    Reads what stage export of the run has made. To have them made by every run, name them in export.formats of params.yaml.
    """
    with runtime.stage():
        paths = runtime.command_paths(f"export@{run}")
        modules = export.exporters(formats)
        taken = [str(out / name) for name in modules if (out / name).exists()]
        if taken:
            raise ValueError(f"{', '.join(taken)} exist already: choose another --out, or delete them")
        export.write_formats(paths["pseudo-masks"], records.read(paths["records"]), modules, out)
    for name in modules:
        click.echo(out / name)


main.help = (main.help or "").format(formats=", ".join(plugins.available(plugins.FILES)))

if __name__ == "__main__":
    main()
