"""Records + trained segmenter → predictions on val."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, sections, store
from pipeline.core import records as records_file
from pipeline.steps import segment


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--segmenter", type=click.Path(path_type=Path), required=True, help="Read: the trained segmenter.")
@click.option(
    "--predictions", type=click.Path(path_type=Path), required=True, help="Written: HDF5 store of labels and confidences."
)
def main(method: str, records: Path, segmenter: Path, predictions: Path) -> None:
    """Segments split val with the segmenter of METHOD's column; tags are not used.

    Reads section segment.METHOD of params.yaml, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Segment, config.section(values, "segment", method), f"segment.{method}")
        crf, name = segment.crf_of(settings, method), sections.column(values, method).segmenter
        options = segment.options_of(name, settings, method)
        read, device = records_file.read(records), runtime.device()
        segment.training_of(name, segmenter, read.labels)
        by_id = {record.id: record for record in read.split("val")}
        parts = store.parts_of(by_id, settings.images_per_part)
        digest = store.digest(dataclasses.asdict(settings))
        key = store.digest([digest, runtime.code_digest(), store.file_digest(records), store.file_digest(segmenter)])
        with store.Workspace(predictions, key) as work:
            job = segment.Job(
                segmenter=name,
                weights=segmenter,
                settings=settings,
                crf=crf,
                options=options,
                root=Path(sections.dataset(values).root),
                labels=read.labels,
                parts=len(parts),
                params_digest=digest,
                out=work.result,
                device=device,
            )
            todo = [(part, [by_id[one] for one in parts[part]]) for part in store.missing_parts(work.result, parts)]
            function = partial(segment.segment_part, job=job)
            for _ in runtime.each(function, todo, processes=runtime.workers(device), what=f"segment {method}"):
                pass


if __name__ == "__main__":
    main()
