"""Refined labels + corrected masks → pseudo-masks."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, sections, store
from pipeline.core import records as records_file
from pipeline.steps import corrections as corrected
from pipeline.steps import export


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--refined", type=click.Path(path_type=Path), required=True, help="Read: HDF5 store of refine.")
@click.option("--corrections", type=click.Path(path_type=Path), required=True, help="Read: folder of masks a person mended.")
@click.option("--pseudo-masks", type=click.Path(path_type=Path), required=True, help="Written: the product, an HDF5 store.")
@click.option("--exports", type=click.Path(path_type=Path), required=True, help="Written: the same in other formats.")
def main(method: str, records: Path, refined: Path, corrections: Path, pseudo_masks: Path, exports: Path) -> None:
    """Turns METHOD's refined labels into pseudo-masks: 255 where confidence is low or background levels disagree.

    Reads section export.METHOD of params.yaml. Classes outside an image's tags appear only where a person painted them.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Export, config.section(values, "export", method), f"export.{method}")
        formats = export.exporters(settings.formats)
        read = records_file.read(records)
        by_id = {record.id: record for record in read.split("train")}
        found = store.Store(refined, store.REFINED)
        found.require(by_id)
        mended = corrected.find(corrections, read)
        parts = store.parts_of(by_id, settings.images_per_part)
        digest = store.digest(dataclasses.asdict(settings))
        key = store.digest([digest, runtime.code_digest(), found.logical_digest, store.file_digest(records), mended.digest])
        with store.Workspace(pseudo_masks, key) as work:
            job = export.Job(settings, refined, mended, read.labels, len(parts), digest, work.result)
            todo = [(part, [by_id[one] for one in parts[part]]) for part in store.missing_parts(work.result, parts)]
            function = partial(export.export_part, job=job)
            for _ in runtime.each(function, todo, processes=runtime.workers(), what=f"export {method}"):
                pass
            export.write_corrected(job, by_id)
        with store.Workspace(exports, store.digest([key, "formats"])) as work:
            export.write_formats(pseudo_masks, read, formats, work.result)


if __name__ == "__main__":
    main()
