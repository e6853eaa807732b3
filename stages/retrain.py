"""Pseudo-masks + initial weights → a trained segmenter."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import sections
from pipeline.steps import train


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--pseudo-masks", type=click.Path(path_type=Path), required=True, help="Read: HDF5 store of export.")
@click.option("--init", type=click.Path(path_type=Path), required=True, help="Read: initial weights of the encoder.")
@click.option(
    "--segmenter", type=click.Path(path_type=Path), required=True, help="Written: the trained segmenter, safetensors."
)
@click.option("--log", type=click.Path(path_type=Path), required=True, help="Written: losses by step, CSV.")
def main(method: str, records: Path, pseudo_masks: Path, init: Path, segmenter: Path, log: Path) -> None:
    """Trains the segmenter of METHOD's column on its pseudo-masks.

    Reads section retrain.METHOD of params.yaml, and the images under dataset.root. A run that was killed goes on where it was.
    """
    with runtime.stage():
        values = sections.read()
        name, device = sections.column(values, method).segmenter, runtime.device()
        job, metadata = train.job(
            values,
            kind="segmenters",
            key=method,
            plugin=name,
            family=name,
            records=records,
            init=init,
            masks=pseudo_masks,
            root=Path(sections.dataset(values).root),
            code=runtime.code_digest,
            device=device,
            loaders=runtime.loaders(device),
            ranks=runtime.ranks,
        )
        train.run(
            job,
            metadata,
            model=segmenter,
            log=log,
            progress=lambda notes, steps: runtime.progress(notes, steps, f"retrain {method}"),
        )


if __name__ == "__main__":
    main()
