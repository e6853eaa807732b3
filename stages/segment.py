"""Records + trained segmenter → predictions on val; or any folder of images + trained segmenter → masks and overlays."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import click

from pipeline import runtime
from pipeline.core import config, sections, store
from pipeline.core import records as records_file
from pipeline.steps import apply, segment

PATH: Any = click.Path(path_type=Path)


@click.command()
@click.argument("method")
@click.option("--records", type=PATH, help="Read: records.h5 of prepare.")
@click.option(
    "--segmenter", type=PATH, help="Read: the trained segmenter. With --images: artifacts/METHOD/segmenter.safetensors."
)
@click.option("--predictions", type=PATH, help="Written: HDF5 store of labels and confidences.")
@click.option("--images", type=PATH, help="Read: any folder of images, in place of --records.")
@click.option("--out", type=PATH, help="Written: a folder of palette PNGs and overlays, in place of --predictions.")
@click.option("--overwrite", is_flag=True, help="Replaces masks that are in --out already.")
def main(
    method: str,
    records: Path | None,
    segmenter: Path | None,
    predictions: Path | None,
    images: Path | None,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Segments with the segmenter of METHOD's column; tags are not used.

    As a stage (--records, --segmenter, --predictions) it segments split val; finished parts survive a crash. With --images and
    --out it segments a folder, outside the DAG: images that cannot be read are told at the end, and the exit code is then 1.
    Reads sections methods.METHOD and segment.METHOD of params.yaml.
    """
    if images and out and not (records or predictions):
        _folder(method, segmenter or Path("artifacts") / method / "segmenter.safetensors", images, out, overwrite)
    elif records and segmenter and predictions and not (images or out or overwrite):
        _stage(method, records, segmenter, predictions)
    else:
        raise click.UsageError("Give --records, --segmenter and --predictions; or --images and --out.")


def _job(method: str, weights: Path, **rest: Any) -> segment.Job:
    """The job of METHOD's column; rest: root, labels, parts, out."""
    values = sections.read()
    settings = config.parse(sections.Segment, config.section(values, "segment", method), f"segment.{method}")
    name = sections.column(values, method).segmenter
    segment.training_of(name, weights, rest["labels"])
    return segment.Job(
        segmenter=name,
        weights=weights,
        settings=settings,
        crf=segment.crf_of(settings, method),
        options=segment.options_of(name, settings, method),
        params_digest=store.digest(dataclasses.asdict(settings)),
        device=runtime.device(),
        **rest,
    )


def _stage(method: str, records: Path, segmenter: Path, predictions: Path) -> None:
    with runtime.stage():
        read = records_file.read(records)
        root = Path(sections.dataset(sections.read()).root)
        job = _job(method, segmenter, root=root, labels=read.labels, parts=0, out=predictions)
        by_id = {record.id: record for record in read.split("val")}
        parts = store.parts_of(by_id, job.settings.images_per_part)
        files = store.file_digest(records), store.file_digest(segmenter)
        key = store.digest([job.params_digest, runtime.code_digest(), *files])
        with store.Workspace(predictions, key) as work:
            job = dataclasses.replace(job, parts=len(parts), out=work.result)
            todo = [(part, [by_id[one] for one in parts[part]]) for part in store.missing_parts(work.result, parts)]
            function = partial(segment.segment_part, job=job)
            for _ in runtime.each(function, todo, processes=runtime.workers(job.device), what=f"segment {method}"):
                pass


def _folder(method: str, segmenter: Path, images: Path, out: Path, overwrite: bool) -> None:
    with runtime.stage():
        labels = apply.labels_of(segmenter)
        job = _job(method, segmenter, root=images, labels=labels, parts=0, out=out)
        found = apply.targets(images, out)
        made_by = apply.made_by(method, segmenter, dataclasses.asdict(job.settings), labels)
        todo = apply.remaining(found, out, made_by, overwrite=overwrite)
        if len(todo) < len(found):
            runtime.log.info(
                "%d of %d images have their masks already; --overwrite makes them anew", len(found) - len(todo), len(found)
            )
        processes = runtime.workers(job.device)
        told = list(runtime.each(partial(apply.apply_one, job=job), todo, processes=processes, what=f"segment {method}"))
        bad = [problem for problem in told if problem is not None]
        for problem in bad:
            click.echo(problem, err=True)
    click.echo(f"{len(todo) - len(bad)} masks and overlays written to {out}; {len(bad)} images could not be read", err=True)
    if bad:
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
