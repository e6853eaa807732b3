"""Records + initial weights → a trained method."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import sections
from pipeline.steps import train


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--init", type=click.Path(path_type=Path), required=True, help="Read: initial weights of the backbone.")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Written: the trained method, safetensors.")
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Written: losses by step, CSV.")
def main(method: str, records: Path, init: Path, model: Path, log: Path) -> None:
    """Trains METHOD (a key of `methods` in params.yaml) on the tags of split train. No mask is read.

    Reads section train.METHOD of params.yaml, and the images under dataset.root. A run that was killed goes on where it was.
    """
    with runtime.stage():
        runtime.check_params()
        values = sections.read()
        device = runtime.device()
        job, metadata = train.job(
            values,
            kind="methods",
            key=method,
            plugin=method,
            family=sections.column(values, method).backbone,
            records=records,
            init=init,
            masks=None,
            root=Path(sections.dataset(values).root),
            code=runtime.code_digest,
            device=device,
            loaders=runtime.loaders(device),
            ranks=runtime.ranks,
        )
        train.run(
            job,
            metadata,
            model=model,
            log=log,
            progress=lambda notes, steps: runtime.progress(notes, steps, f"train {method}"),
        )


if __name__ == "__main__":
    main()
