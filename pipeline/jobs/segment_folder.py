"""Any folder of images + a trained segmenter → masks and overlays beside them; outside the DAG, so without records."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core import records, store
from pipeline.core.labels import BACKGROUND, LabelSpace
from pipeline.core.sections import Settings
from pipeline.imaging.palette import voc_palette
from pipeline.jobs import segment
from pipeline.jobs.engine import Engine
from pipeline.listing import images_under
from pipeline.mask_files import hex_of, legend, palette_png
from pipeline.training import checkpoint

LONG_SIDE = 2048  # px of an overlay, which is for looking; the mask has every pixel
OPACITY = 0.5
MADE_BY = "segmented.json"


@dataclass(frozen=True)
class Target:
    """One image to segment: source relative to the folder of images, mask and overlay where they go."""

    source: Path
    mask: Path
    overlay: Path


@dataclass(frozen=True)
class Result:
    """written: number of masks; problems: a text for each image that could not be read."""

    written: int
    problems: list[str]


def run(settings: Settings, weights: Path, images: Path, out: Path, *, overwrite: bool, engine: Engine) -> Result:
    """Segments every image under `images`. ValueError where there is nothing to do or results of other settings are in the way."""
    labels = labels_of(weights)
    job = segment.job_of(settings, weights, root=images, labels=labels, out=out, device=engine.device())
    listed = targets(images, out)
    origin = made_by(settings.name, weights, dataclasses.asdict(job.settings), labels)
    missing = remaining(listed, out, origin, overwrite=overwrite)
    if len(missing) < len(listed):
        engine.info(
            "%d of %d images have their masks already; --overwrite makes them anew", len(listed) - len(missing), len(listed)
        )
    answers = engine.each(partial(apply_one, job=job), missing, what=f"segment {settings.name}", device=job.device)
    problems = [problem for problem in answers if problem is not None]
    return Result(len(missing) - len(problems), problems)


def labels_of(weights: Path) -> LabelSpace:
    """The classes that a segmenter was trained on. ValueError if there is no such file, or another program wrote it."""
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; train it by `dvc repro`, or name another file by --segmenter")
    return LabelSpace(tuple(json.loads(checkpoint.read_metadata(weights)["labels"])))


def targets(images: Path, out: Path) -> list[Target]:
    """Every image under `images`, at any depth; hidden files are passed over.

    a/b.jpg becomes masks/a/b.png and overlays/a/b.jpg. Where two images would share a mask, both keep their suffix: b.jpg.png.
    ValueError where there is nothing to do, or where results would lie among the images.
    """
    if out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"--out {out} lies in --images {images}: overlays would be taken for images next time")
    sources = images_under(images)
    if not sources:
        raise ValueError(f"--images {images} holds no image")
    shared = Counter(source.with_suffix("") for source in sources)
    stems = [source if shared[source.with_suffix("")] > 1 else source.with_suffix("") for source in sources]
    twice = sorted(str(stem) for stem, count in Counter(stems).items() if count > 1)
    if twice:
        raise ValueError(f"two images would share a mask: {', '.join(map(repr, twice))}; rename one of each")
    return [
        Target(source, out / "masks" / f"{stem}.png", out / "overlays" / f"{stem}.jpg")
        for source, stem in zip(sources, stems, strict=True)
    ]


def remaining(found: list[Target], out: Path, made_by: dict[str, Any], *, overwrite: bool) -> list[Target]:
    """The targets that are not written yet, or all; writes segmented.json, which says what made the masks.

    ValueError where files are in the way and something else made them: a killed run goes on, two segmenters never mix.
    """
    path = out / MADE_BY
    text = json.dumps(made_by, indent=1, ensure_ascii=False) + "\n"
    there = [target for target in found if target.mask.exists() or target.overlay.exists()]
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    if there and not same and not overwrite:
        shown = ", ".join(repr(str(target.mask)) for target in there[:5])
        raise ValueError(
            f"{out} holds masks of {len(there)} of these images that another segmenter or other settings made ({shown}"
            f"{', …' if len(there) > 5 else ''}); add --overwrite to replace them, or name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for target in there if overwrite else ():  # first of all: a run killed half-way must not take old masks for its own
        target.mask.unlink(missing_ok=True)
        target.overlay.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    return [target for target in found if not (target.mask.exists() and target.overlay.exists())]


def made_by(method: str, weights: Path, settings: dict[str, Any], labels: LabelSpace) -> dict[str, Any]:
    """segmented.json: the digests of segmenter and settings, and what the values and colours of the masks mean."""
    return {
        "method": method,
        "segmenter": store.file_digest(weights),
        "settings": store.digest(settings),
        "classes": [{"value": value, "name": name, "color": hex_of(value)} for value, name in legend(labels).items()],
    }


def apply_one(target: Target, job: segment.Job) -> str | None:
    """Writes mask and overlay of one image, each whole or not at all; returns what is wrong with the image, or None.

    The image is read as prepare reads it: upright, 8-bit RGB. job.root is the folder of images.
    """
    try:
        image = records.decode((job.root / target.source).read_bytes())
    except Exception as error:  # whatever a decoder throws at a broken file is that file's problem, not the run's
        words = "not a known image format" if "cannot identify" in str(error) else f"{error or type(error).__name__}"
        return f"{str(target.source)!r} cannot be read: {words}"
    model = segment.load(job.segmenter, job.weights.resolve(), job.labels, job.device, str(job.out.resolve()))
    mask = segment.segment_one(image, model, job)["label"]
    _whole(target.mask, palette_png(mask))
    drawn = io.BytesIO()
    Image.fromarray(overlay(image, mask)).save(drawn, "JPEG", quality=90)
    _whole(target.overlay, drawn.getvalue())
    return None


def _whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """u8[h,w,3], u8[h,w] → u8[h',w',3] with a long side of at most LONG_SIDE px: classes tinted, their borders drawn."""
    h, w = mask.shape
    factor = min(1.0, LONG_SIDE / max(h, w))
    size = max(1, round(w * factor)), max(1, round(h * factor))
    if size != (w, h):
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    out, colours = image.copy(), voc_palette()
    some = mask != BACKGROUND
    out[some] = np.round((1 - OPACITY) * image[some] + OPACITY * colours[mask[some]]).astype(np.uint8)
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    out[border] = np.where(some, 255, 0).astype(np.uint8)[border][:, None]  # white within, black without: seen on any ground
    return out
