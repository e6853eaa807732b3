"""Pseudo-masks + initial weights → per image, how far a segmenter that never saw its pseudo-mask agrees with it."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import click

from pipeline import runtime
from pipeline.core import records as records_file
from pipeline.core import sections, store
from pipeline.steps import cross_validate, segment, train


@click.command()
@click.argument("method")
@click.option("--records", type=click.Path(path_type=Path), required=True, help="Read: records.h5 of prepare.")
@click.option("--pseudo-masks", type=click.Path(path_type=Path), required=True, help="Read: HDF5 store of export.")
@click.option("--init", type=click.Path(path_type=Path), required=True, help="Read: initial weights of the encoder.")
@click.option("--held-out", type=click.Path(path_type=Path), required=True, help="Written: two figures per image, HDF5.")
def main(method: str, records: Path, pseudo_masks: Path, init: Path, held_out: Path) -> None:
    """Trains METHOD's segmenter once per fold, without the fold's images, and holds what it says of them against their masks.

    Reads sections cross_validate.METHOD, retrain.METHOD and segment.METHOD of params.yaml, and the images under dataset.root.
    With folds 0 it writes a store of no images. Finished folds, parts and training steps survive a crash.
    """
    with runtime.stage():
        values = sections.read()
        settings, segmentation = cross_validate.settings(values, method), cross_validate.segment_settings(values, method)
        labels = records_file.read(records).labels
        if not settings.folds:
            cross_validate.write(held_out, (), labels, settings)
            return
        name, device, root = (
            sections.column(values, method).segmenter, runtime.device(), Path(sections.dataset(values).root),
        )  # fmt: skip
        whole, metadata = train.job(
            values, kind="segmenters", key=method, plugin=name, family=name, records=records, init=init, masks=pseudo_masks,
            root=root, code=runtime.code_digest, device=device, loaders=runtime.loaders(device), ranks=runtime.ranks,
        )  # fmt: skip
        folds = cross_validate.plan(whole, settings.folds, method)
        digest = store.digest([dataclasses.asdict(settings), dataclasses.asdict(segmentation)])
        with store.Workspace(held_out, store.digest([whole.work.name, digest])) as work:
            folders = []
            for fold in folds:
                weights, what = work.folder / f"fold-{fold.number}.safetensors", f"fold {fold.number + 1} of {method}"
                if not weights.exists():
                    train.run(
                        fold.training, metadata, model=weights, log=weights.with_suffix(".csv"),
                        progress=lambda notes, steps, what=what: runtime.progress(notes, steps, f"train without {what}"),
                    )  # fmt: skip
                by_id = {record.id: record for record in fold.held_out}
                parts, out = store.parts_of(by_id, segmentation.images_per_part), weights.with_suffix("")
                job = cross_validate.Job(
                    segment.Job(
                        segmenter=name, weights=weights, settings=segmentation, crf=None,
                        options=segment.options_of(name, segmentation, method), root=root, labels=labels, parts=len(parts),
                        params_digest=digest, out=out, device=device,
                    ),
                    pseudo_masks,
                    settings.temperature,
                )  # fmt: skip
                todo = [(part, [by_id[one] for one in parts[part]]) for part in store.missing_parts(out, parts)]
                function = partial(cross_validate.score_part, job=job)
                for _ in runtime.each(function, todo, processes=runtime.workers(device), what=f"segment {what}"):
                    pass
                folders.append(out)
            cross_validate.write(work.result / held_out.name, cross_validate.gathered(folders), labels, settings)


if __name__ == "__main__":
    main()
