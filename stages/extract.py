"""Records + trained method → score maps."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import config, plugins, sections, store
from pipeline.core import records as records_file
from pipeline.steps import extract, inspect


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Read: the trained method.")
@click.option("--scoremaps", type=click.Path(path_type=Path), required=True, help="Written: HDF5 store of score maps.")
@click.option(
    "--inspection",
    type=click.Path(path_type=Path),
    required=True,
    help="Written: pictures of inner maps of some images, HDF5.",
)
def main(method: str, records: Path, model: Path, scoremaps: Path, inspection: Path) -> None:
    """Writes METHOD's score maps: on train for the classes of the tags, on val for those that the network finds.

    Reads section extract.METHOD of params.yaml, and the images under dataset.root. Finished parts survive a crash.
    """
    with runtime.stage():
        values = sections.read()
        settings = config.parse(sections.Extract, config.section(values, "extract", method), f"extract.{method}")
        extract.options_of(method, settings)
        backbone = sections.column(values, method).backbone
        plugins.load("nn", backbone)  # imported here, so that digest and guard see the family's code
        read, device = records_file.read(records), runtime.device()
        by_id = read.by_id()
        parts = store.parts_of(by_id, settings.images_per_part)
        digest = store.digest(dataclasses.asdict(settings))
        key = store.digest([digest, runtime.code_digest(), store.file_digest(records), store.file_digest(model)])
        with store.Workspace(scoremaps, key) as work:
            job = extract.Job(
                method=method,
                backbone=backbone,
                model=model,
                settings=settings,
                root=Path(sections.dataset(values).root),
                labels=read.labels,
                parts=len(parts),
                params_digest=digest,
                out=work.result,
                device=device,
            )
            todo = [(part, [by_id[one] for one in parts[part]]) for part in store.missing_parts(work.result, parts)]
            function = partial(extract.extract_part, job=job)
            for _ in runtime.each(function, todo, processes=runtime.workers(device), what=f"extract {method}"):
                pass
            loaded = extract.load(method, backbone, model.resolve(), device, str(work.result.resolve()))
            some = inspect.chosen(read.images, settings.inspect)
            pictures = inspect.inspections(some, loaded, len(read.labels), job.root, settings.long_side, device)
            if inspect.looks_around(loaded, settings.inspect):
                tagged = [inspect.tagged([by_id[one] for one in part]) for part in parts]
                look = partial(inspect.look_around, job=job)
                seen = runtime.each(look, tagged, processes=runtime.workers(device), what=f"surroundings {method}")
                pictures = inspect.with_surroundings(pictures, inspect.together(seen))
            store.write_part(
                inspection,
                store.INSPECTION,
                pictures,
                labels=read.labels,
                part=0,
                parts=1,
                params_digest="",
                compression="gzip",
            )


if __name__ == "__main__":
    main()
