"""Score maps + fitted refiner → refined labels."""

from __future__ import annotations

import dataclasses
from functools import partial
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
@click.option("--refiner", type=click.Path(path_type=Path), required=True, help="Read: state of fit_refiner.")
@click.option(
    "--refined", type=click.Path(path_type=Path), required=True, help="Written: HDF5 store of labels and confidences."
)
def main(method: str, records: Path, scoremaps: Path, refiner: Path, refined: Path) -> None:
    """Refines METHOD's score maps on split train into a label and a confidence per pixel.

    Reads section refine.METHOD of params.yaml, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        values = sections.read()
        column = sections.column(values, method)
        name = column.refiner
        settings = config.parse(sections.Refine, config.section(values, "refine", method), f"refine.{method}")
        params = refine.params_of(name, settings, method)
        if refine.has_network(name):
            plugins.load("nn", column.backbone)  # before its code is digested
        read = records_file.read(records)
        train = read.split("train")
        parts = store.parts_of([record.id for record in train], settings.images_per_part)
        digest = store.digest([name, dataclasses.asdict(settings)])
        maps = store.Store(scoremaps, store.SCORE_MAPS)
        maps.require(record.id for record in read)
        key = store.digest(
            [digest, runtime.code_digest(), store.file_digest(records), maps.logical_digest, store.file_digest(refiner)]
        )
        with store.Workspace(refined, key) as work:
            device = runtime.device() if refine.has_network(name) else "cpu"
            job = refine.Job(
                refiner=name,
                backbone=column.backbone,
                settings=settings,
                params=params,
                scoremaps=scoremaps,
                state=refiner,
                root=Path(sections.dataset(values).root),
                labels=read.labels,
                parts=len(parts),
                params_digest=digest,
                out=work.result,
                device=device,
            )
            todo = list(refine.train_items(train, parts, store.missing_parts(work.result, parts)))
            function = partial(refine.refine_part, job=job)
            for _ in runtime.each(function, todo, processes=runtime.workers(device), what=f"refine {method}"):
                pass


if __name__ == "__main__":
    main()
