"""Score maps → a fitted refiner."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, plugins, sections, store
from pipeline.core import records as records_file
from pipeline.steps import refine


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--scoremaps", type=click.Path(path_type=Path), required=True, help="Read: HDF5 store of extract.")
@click.option("--refiner", type=click.Path(path_type=Path), required=True, help="Written: the refiner's state, safetensors.")
def main(method: str, records: Path, scoremaps: Path, refiner: Path) -> None:
    """Fits the refiner of METHOD's column on split train: its background level, and what it learns. No mask is read.

    Reads section fit_refiner.METHOD of params.yaml.
    """
    with runtime.stage():
        values = sections.read()
        name = sections.column(values, method).refiner
        where = f"fit_refiner.{method}"
        params = config.parse(plugins.load("refiners", name).FitParams, config.section(values, "fit_refiner", method), where)
        read = records_file.read(records)
        scores = store.Store(scoremaps, store.SCORE_MAPS)
        scores.require(record.id for record in read)
        state = refine.fit(name, params, scores, read.split("train"), Path(sections.dataset(values).root))
        refine.write_state(refiner, name, state)
        runtime.log.info("background level %.4f", float(state["background"][0]))


if __name__ == "__main__":
    main()
