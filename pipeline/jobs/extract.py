"""Stage extract: images + trained method → score maps of all of them, and pictures of the method's inside."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipeline.core import plugins, store
from pipeline.core import records as records_file
from pipeline.core.sections import Extract, Settings
from pipeline.jobs import inspect
from pipeline.jobs.engine import Engine, parts_of, run_parts
from pipeline.jobs.score_maps import Job, extract_part


def run(settings: Settings, *, records: Path, model: Path, scoremaps: Path, inspection: Path, engine: Engine) -> None:
    """Stage extract: score maps of all images, and pictures of the method's inside."""
    extraction = settings.section(Extract, "extract")
    method, backbone = settings.run.method, settings.run.backbone
    options = options_of(settings, extraction)
    plugins.load("nn", backbone)  # imported here, so that digest and guard see the family's code
    listed = records_file.read(records)
    parts = parts_of(listed.table, extraction.images_per_part)
    digest = store.digest(dataclasses.asdict(extraction))
    key = store.digest([digest, engine.code_digest(), store.file_digest(records), store.file_digest(model)])
    device = engine.device()
    with store.Workspace(scoremaps, key) as work:
        job = Job(
            method=method, backbone=backbone, model=model, settings=extraction, options=options, root=settings.root,
            labels=listed.labels, parts=len(parts), params_digest=digest, out=work.result, device=device,
            loaders=engine.loaders(device),
        )  # fmt: skip
        run_parts(extract_part, parts, job, out=work.result, engine=engine, what=f"extract {settings.name}")
        inspect.write(inspection, listed, parts, job, engine=engine, what=f"surroundings {settings.name}")


def options_of(settings: Settings, extraction: Extract) -> Any:
    """extract.options as the method's Options."""
    return settings.part(plugins.load("methods", settings.run.method).Options, extraction.options, "extract.options")
