"""Raw images and tags → records and truth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, sections, store
from pipeline.steps import prepare


@click.command()
@click.option("--raw", type=click.Path(path_type=Path), required=True, help="Read: the data set's folder, dataset.root.")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Written: ids, sizes, splits, tags, hashes.")
@click.option("--truth", type=click.Path(path_type=Path), required=True, help="Written: masks, where there are any.")
def main(raw: Path, records: Path, truth: Path) -> None:
    """Opens every image and mask once and checks everything at once; all later stages rely on what it wrote.

    Reads sections dataset and prepare of params.yaml.
    """
    with runtime.stage():
        values = sections.read()
        rules = config.parse(sections.Prepare, values["prepare"], "prepare")
        settings = replace(sections.dataset(values), root=str(raw))
        mapper = partial(runtime.each, processes=runtime.workers(), what="prepare", unit=prepare.PER_ITEM)
        digest = store.digest([settings.name, settings.options])
        found = prepare.prepare(settings, rules, digest=digest, records_out=records, truth_out=truth, mapper=mapper)
        runtime.log.info(
            "%d images (%d train, %d val), %d classes, %d skipped",
            len(found), len(found.split("train")), len(found.split("val")), len(found.labels), len(found.skipped),
        )  # fmt: skip


if __name__ == "__main__":
    main()
