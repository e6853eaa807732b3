"""A run's trained segmenter → an ONNX file with its metadata, checked against torch on photographs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import records as records_file
from pipeline.core import refiner_state, store
from pipeline.core.labels import BACKGROUND
from pipeline.core.sections import Settings
from pipeline.jobs import onnx_graph, onnx_model, windows
from pipeline.jobs.engine import Engine
from pipeline.jobs.onnx_model import Metadata, OnnxSegmenter
from pipeline.jobs.torch_predictor import TorchSegmenter
from pipeline.listing import images_under

CHECKED = 10  # photographs
REQUIRED = 0.999  # of their pixels must have torch's mask value
QUANTISED = ".int8.onnx"


@dataclass(frozen=True)
class Written:
    """An ONNX file beside torch.

    equal          fraction of the pixels of `images` photographs whose mask value is torch's
    foreground     fraction of the pixels that are of a class by torch: where it is 0, equality says little
    seconds        per photograph by onnxruntime, one thread; torch_seconds: by torch
    quantisation   none, dynamic or static
    """

    path: Path
    bytes: int
    images: int
    equal: float
    foreground: float
    seconds: float
    torch_seconds: float
    quantisation: str

    def __str__(self) -> str:
        kind = "fp32" if self.quantisation == "none" else f"int8, {self.quantisation} quantisation"
        return (
            f"{self.path}: {self.bytes / 1e6:.1f} MB, {kind}; {self.equal:.4%} of the pixels of {self.images} photographs "
            f"as by torch ({self.foreground:.0%} are of a class); {self.seconds:.2f} s a photograph, torch "
            f"{self.torch_seconds:.2f} s (one thread)"
        )


def run(
    settings: Settings, weights: Path, out: Path, *, int8: bool, images: Path | None, records: Path, engine: Engine
) -> list[Written]:
    """Writes `out` and, with int8, a second file beside it.

    images: folder of photographs to check on; None: those of records.h5, split val first. ValueError where there is none, or
    where masks differ too much from torch's; then no file is written.
    """
    onnx_model.require("onnx", "onnxruntime")
    if out.suffix != ".onnx":
        raise ValueError(f"--onnx {out}: the file's name must end in .onnx")
    photographs = photographs_of(settings, images, records)
    torch_segmenter = without_crf(TorchSegmenter.of(settings, weights, "cpu"))
    description = Metadata(
        labels=torch_segmenter.labels, segment=dataclasses.replace(torch_segmenter.job.settings, crf=_crf(settings)),
        supervision=supervision_of(weights), run=settings.name, segmenter=settings.run.segmenter,
        sha256=torch_segmenter.sha256, version=packages.version("tag2mask"), quantisation="none",
    )  # fmt: skip
    engine.info("writing %s", out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        save(onnx_graph.model_of(torch_segmenter.network(), torch_segmenter.job.options), description, partial)
        checked = photographs[:CHECKED]
        expected, torch_seconds = masks_of(torch_segmenter, checked, engine, "by torch")
        written = compare(partial, out, checked, expected, torch_seconds, engine)
        if written.equal < REQUIRED:
            raise ValueError(
                f"{written}\nAt least {REQUIRED:.1%} of the pixels must be equal: no file was written. Please report the "
                f"architecture ({settings.run.segmenter}) with the versions of `pip list`"
            )
        partial.replace(out)
        if not int8:
            return [written]
        target = out.with_name(out.name.removesuffix(".onnx") + QUANTISED)
        return [written, quantised(out, target, photographs, expected, torch_seconds, description, engine)]
    finally:
        partial.unlink(missing_ok=True)


def quantised(
    out: Path, target: Path, photographs: Sequence[Path], expected: Sequence[np.ndarray], torch_seconds: float,
    description: Metadata, engine: Engine,
) -> Written:  # fmt: skip
    """Writes the int8 file beside `out`. Activations are measured on photographs that the check does not see, where there
    are enough."""
    import onnx

    engine.info("writing %s", target)
    partial = target.with_name(target.name + ".partial")
    others = photographs[CHECKED:] or photographs
    try:
        kind = onnx_graph.quantise(out, partial, calibration(others, description))
        save(onnx.load(partial), dataclasses.replace(description, quantisation=kind), partial)
        written = compare(partial, target, photographs[:CHECKED], expected, torch_seconds, engine)
        partial.replace(target)
        return written
    finally:
        partial.unlink(missing_ok=True)


def without_crf(segmenter: TorchSegmenter) -> TorchSegmenter:
    """The segmenter as its ONNX file computes: in fp32 and without CRF."""
    job = segmenter.job
    plain = dataclasses.replace(job.settings, precision="fp32", crf=None)
    return dataclasses.replace(segmenter, job=dataclasses.replace(job, settings=plain, crf=None))


def _crf(settings: Settings) -> Any:
    """segment.crf as it stands in the recipe, so that a user of the file learns of it."""
    return settings.recipe["segment"]["crf"]


def supervision_of(weights: Path) -> str:
    """What the run's pseudo-masks learned from, by the files beside `weights`: tags, where there are none."""
    refiner = weights.with_name("refiner.safetensors")
    supervision = refiner_state.supervision(refiner) if refiner.is_file() else refiner_state.TAGS
    corrected = (weights.parent / "pseudo_masks" / store.CORRECTED).is_file()
    return f"{supervision} + corrected masks" if corrected else supervision


def photographs_of(settings: Settings, images: Path | None, records: Path) -> list[Path]:
    """Up to twice CHECKED photographs, the same for the same files. ValueError where there is none."""
    if images is not None:
        names = {path.as_posix(): images / path for path in images_under(images)}
        chosen = [names[name] for name in records_file.shuffled(names)]
        source = f"--check-images {images} holds no image"
    else:
        listed = records_file.read(records) if records.is_file() else None
        splits = [] if listed is None else [*_shuffled(listed.split("val")), *_shuffled(listed.split("train"))]
        chosen = [path for record in splits if (path := settings.root / record.path).is_file()]
        source = f"{records} names no photograph that is there: give --check-images FOLDER with ten photographs"
    if not chosen:
        raise ValueError(source)
    return chosen[: 2 * CHECKED]


def _shuffled(records: Sequence[records_file.ImageRecord]) -> list[records_file.ImageRecord]:
    by_id = {record.id: record for record in records}
    return [by_id[image_id] for image_id in records_file.shuffled(by_id)]


def save(model: Any, description: Metadata, path: Path) -> None:
    """Writes an onnx.ModelProto with its metadata."""
    import onnx

    model.producer_name, model.producer_version = "tag2mask", description.version
    model.ClearField("metadata_props")
    onnx.helper.set_model_props(model, description.properties())
    onnx.save(model, path)


def calibration(photographs: Sequence[Path], description: Metadata) -> Iterator[np.ndarray]:
    """Windows f32[b,3,h,w] of photographs, as they are segmented."""
    for path in photographs:
        image = records_file.decode(path.read_bytes())
        for pixels, _ in windows.views(image, description.segment, len(description.labels) + 1):
            view = np.moveaxis(pixels, -1, 0).astype(np.float32) / 255
            for corners in windows.batches(view.shape[1:], description.segment):
                yield np.stack([view[:, rows, columns] for rows, columns in corners])


def masks_of(segmenter: Any, photographs: Sequence[Path], engine: Engine, what: str) -> tuple[list[np.ndarray], float]:
    """Masks of a Predictor, and its seconds per photograph, decoding left out. The first photograph is segmented twice,
    since a first call sets things up."""
    images = [records_file.decode(path.read_bytes()) for path in photographs]
    segmenter.mask(images[0])
    seconds = 0.0
    masks = []
    for image in engine.progress(images, len(images), what):
        started = time.perf_counter()
        masks.append(segmenter.mask(image))
        seconds += time.perf_counter() - started
    return masks, seconds / len(images)


def compare(
    path: Path, name: Path, photographs: Sequence[Path], expected: Sequence[np.ndarray], torch_seconds: float, engine: Engine
) -> Written:
    """An ONNX file beside torch's masks."""
    segmenter = OnnxSegmenter.read(path)
    masks, seconds = masks_of(segmenter, photographs, engine, "by onnxruntime")
    pixels = sum(mask.size for mask in expected)
    same = sum(int((mask == other).sum()) for mask, other in zip(masks, expected, strict=True))
    foreground = sum(int((mask != BACKGROUND).sum()) for mask in expected)
    kind = segmenter.metadata.quantisation
    size, count = path.stat().st_size, len(photographs)
    return Written(name, size, count, same / pixels, foreground / pixels, seconds, torch_seconds, kind)
