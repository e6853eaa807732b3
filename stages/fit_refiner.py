"""Score maps → a fitted refiner."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, plugins, sections, store
from pipeline.core import records as records_file
from pipeline.steps import fit_refiner, refine


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--scoremaps", type=click.Path(path_type=Path), required=True, help="Read: HDF5 store of extract.")
@click.option(
    "--init", type=click.Path(path_type=Path), required=True, help="Read: initial weights of a learned refiner's backbone."
)
@click.option("--refiner", type=click.Path(path_type=Path), required=True, help="Written: the refiner's state, safetensors.")
def main(method: str, records: Path, scoremaps: Path, init: Path, refiner: Path) -> None:
    """Fits the refiner of METHOD's column on split train: its background level, and what it learns. No mask is read.

    Reads section fit_refiner.METHOD of params.yaml. A run that was killed goes on where it was.
    """
    with runtime.stage():
        values = sections.read()
        column, root = sections.column(values, method), Path(sections.dataset(values).root)
        name, where = column.refiner, f"fit_refiner.{method}"
        params = config.parse(plugins.load("refiners", name).FitParams, config.section(values, "fit_refiner", method), where)
        fit_refiner.check(name, params, where)
        read = records_file.read(records)
        scores = store.Store(scoremaps, store.SCORE_MAPS)
        scores.require(record.id for record in read)
        train = read.split("train")
        told = fit_refiner.described(params)
        state = refine.fit(name, params, scores, train, root)
        level = float(state["background"][0])
        runtime.log.info("background level %.4f", level)
        if not refine.has_network(name):
            refine.write_state(refiner, name, state, told)
            return
        plugins.load("nn", column.backbone)  # before its code is digested
        key = store.digest([
            name, column.backbone, told, runtime.code_digest(), store.file_digest(records), scores.logical_digest,
            store.file_digest(init),
        ])  # fmt: skip
        with store.Workspace(refiner, key) as work:
            labels = work.folder / "labels"
            parts = store.parts_of([record.id for record in train], fit_refiner.LABELS_PER_PART)
            made = fit_refiner.LabelJob(name, params, level, scoremaps, root, read.labels, len(parts), key, labels)
            todo = list(refine.train_items(train, parts, store.missing_parts(labels, parts)))
            each = partial(fit_refiner.label_part, job=made)
            for _ in runtime.each(each, todo, processes=runtime.workers(), what=f"labels for refiner {method}"):
                pass
            device = runtime.device()
            job = fit_refiner.training(
                name, params, family=column.backbone, init=init, records=train, root=root, classes=len(read.labels),
                labels=labels, work=work.folder, device=device, ranks=runtime.ranks, loaders=runtime.loaders(device),
            )  # fmt: skip
            state |= fit_refiner.train(job, lambda notes, steps: runtime.progress(notes, steps, f"fit_refiner {method}"))
            refine.write_state(work.result / refiner.name, name, state, told)


if __name__ == "__main__":
    main()
