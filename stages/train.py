"""Records + initial weights → a trained method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core.sections import Settings
from pipeline.jobs import train

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("run")
@click.option("--records", type=PATH, required=True, help="Read: records.h5 of prepare.")
@click.option("--init", type=PATH, required=True, help="Read: initial weights of the backbone.")
@click.option("--model", type=PATH, required=True, help="Written: the trained method, safetensors.")
@click.option("--log", type=PATH, required=True, help="Written: losses by step, CSV.")
def main(run: str, records: Path, init: Path, model: Path, log: Path) -> None:
    """Trains the method of RUN (a key of `methods` in params.yaml) on the tags of split train. No mask is read.

    Reads section train of the run's recipe, and the images under dataset.root. A run that was killed goes on where it was.
    """
    with runtime.stage():
        runtime.check_params()
        train.run(
            Settings.read(run), "methods", records=records, init=init, masks=None, model=model, log=log, engine=runtime
        )


if __name__ == "__main__":
    main()
