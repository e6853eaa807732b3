"""Any folder of images + a trained segmenter → masks and overlays. Outside the DAG, so without records.

Imports no torch: the segmenter is a Predictor, by torch (torch_predictor.py) or by onnxruntime (onnx_model.py).
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.core import overlap, records
from pipeline.core.labels import BACKGROUND, LabelSpace
from pipeline.imaging.palette import voc_palette
from pipeline.jobs.engine import Engine
from pipeline.listing import images_under
from pipeline.mask_files import hex_of, legend, palette_png

LONG_SIDE = 2048  # px, at most, of an overlay; masks keep the image's size
OPACITY = 0.5  # of the class colours over the image
DESCRIPTION = "segmented.json"
IMAGES_PER_LOADER = 8  # of a group, which one process segments: enough to decode some ahead


class Predictor(Protocol):
    """A trained segmenter that can be sent to other processes."""

    @property
    def name(self) -> str:
        """Of its run."""
        ...

    @property
    def labels(self) -> LabelSpace: ...

    @property
    def device(self) -> str:
        """Where it computes."""
        ...

    def description(self) -> dict[str, Any]:
        """What masks depend on: run, and digests of segmenter and settings; for segmented.json."""
        ...

    def mask(self, image: np.ndarray) -> np.ndarray:
        """u8[h,w,3] RGB → u8[h,w] mask values."""
        ...


@dataclass(frozen=True)
class Target:
    """An image to segment: source, relative to the folder of images, and the files to write."""

    source: Path
    mask: Path
    overlay: Path


@dataclass(frozen=True)
class Result:
    """written: number of masks; kept: of masks that were there already; problems: a text per image that could not be
    read."""

    written: int
    kept: int
    problems: list[str]


def run(predictor: Predictor, images: Path, out: Path, *, overwrite: bool, engine: Engine) -> Result:
    """Segments every image under `images` that has no mask in `out` yet; with overwrite, every image.

    ValueError where there is no image, or where `out` holds masks of another segmenter or of other settings.
    """
    all_targets = targets(images, out)
    description = describe(predictor)
    unfinished = remaining(all_targets, out, description, overwrite=overwrite)
    loaders = engine.loaders(predictor.device)
    size = max(1, IMAGES_PER_LOADER * loaders)
    groups = [unfinished[at : at + size] for at in range(0, len(unfinished), size)]
    apply = partial(apply_group, images=images, predictor=predictor, loaders=loaders)
    image_problems = engine.map_parts(apply, groups, what=f"segment {predictor.name}", device=predictor.device, images=len)
    problems = [problem for group in image_problems for problem in group]
    return Result(len(unfinished) - len(problems), len(all_targets) - len(unfinished), problems)


def labels_of(weights: Path) -> LabelSpace:
    """The classes that a segmenter was trained on, from its file's metadata. ValueError if there is no such file."""
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; train it by `dvc repro`, or name another file by --segmenter")
    from pipeline.training import checkpoint  # has torch

    return LabelSpace(tuple(json.loads(checkpoint.read_metadata(weights)["labels"])))


def targets(images: Path, out: Path) -> list[Target]:
    """Every image under `images` at any depth, without hidden files.

    a/b.jpg becomes masks/a/b.png and overlays/a/b.jpg. Where two images would share a mask, both keep their suffix:
    b.jpg.png. ValueError where there is no image, or where `out` lies within `images`.
    """
    if out.resolve().is_relative_to(images.resolve()):
        raise ValueError(f"--out {out} lies in --images {images}: overlays would be taken for images next time")
    sources = images_under(images)
    if not sources:
        raise ValueError(f"--images {images} holds no image")
    counts = Counter(source.with_suffix("") for source in sources)
    stems = [source if counts[source.with_suffix("")] > 1 else source.with_suffix("") for source in sources]
    duplicates = sorted(str(stem) for stem, count in Counter(stems).items() if count > 1)
    if duplicates:
        raise ValueError(f"two images would share a mask: {', '.join(map(repr, duplicates))}; rename one of each")
    return [
        Target(source, out / "masks" / f"{stem}.png", out / "overlays" / f"{stem}.jpg")
        for source, stem in zip(sources, stems, strict=True)
    ]


def remaining(all_targets: list[Target], out: Path, description: dict[str, Any], *, overwrite: bool) -> list[Target]:
    """The targets whose files are not written yet, or all of them with overwrite; writes segmented.json.

    A killed run is continued. ValueError where segmented.json says that `out` holds masks of another segmenter or other
    settings.
    """
    path = out / DESCRIPTION
    text = json.dumps(description, indent=1, ensure_ascii=False) + "\n"
    existing = [target for target in all_targets if target.mask.exists() or target.overlay.exists()]
    same = path.is_file() and path.read_text(encoding="utf-8") == text
    if existing and not same and not overwrite:
        examples = ", ".join(repr(str(target.mask)) for target in existing[:5])
        raise ValueError(
            f"{out} holds masks of {len(existing)} of these images that another segmenter or other settings made ({examples}"
            f"{', …' if len(existing) > 5 else ''}); add --overwrite to replace them, or name another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    for target in existing if overwrite else ():  # before segmented.json changes: a killed run must not keep old masks
        target.mask.unlink(missing_ok=True)
        target.overlay.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    return [target for target in all_targets if not (target.mask.exists() and target.overlay.exists())]


def describe(predictor: Predictor) -> dict[str, Any]:
    """Content of segmented.json: run, digests of segmenter and settings, and the names and colours of mask values."""
    names = legend(predictor.labels)
    classes = [{"value": value, "name": name, "color": hex_of(value)} for value, name in names.items()]
    return predictor.description() | {"classes": classes}


def apply_group(group: Sequence[Target], images: Path, predictor: Predictor, loaders: int) -> list[str]:
    """Writes masks and overlays of some images under `images`; returns what is wrong with those that cannot be read.

    loaders: threads that decode images ahead of the predictor; with any, another one writes behind it.
    """
    problems: list[str] = []

    def segmented() -> Generator[tuple[Target, np.ndarray, np.ndarray], None, None]:
        with closing(overlap.ahead(partial(_image_or_problem, images=images), group, loaders, loaders)) as loaded:
            for target, image in zip(group, loaded, strict=True):
                if isinstance(image, str):
                    problems.append(image)
                else:
                    yield target, image, predictor.mask(image)

    def write(results: Iterator[tuple[Target, np.ndarray, np.ndarray]]) -> None:
        for target, image, mask in results:
            _write_atomically(target.mask, palette_png(mask))
            buffer = io.BytesIO()
            Image.fromarray(overlay(image, mask)).save(buffer, "JPEG", quality=90)
            _write_atomically(target.overlay, buffer.getvalue())

    overlap.behind(segmented(), write, min(1, loaders))
    return problems


def _image_or_problem(target: Target, images: Path) -> np.ndarray | str:
    """u8[h,w,3], read as prepare reads it: upright, 8-bit RGB; or what is wrong with the file."""
    try:
        return records.decode((images / target.source).read_bytes())
    except Exception as error:  # decoders raise many kinds of errors on broken files, which must not end the run
        text = "not a known image format" if "cannot identify" in str(error) else f"{error or type(error).__name__}"
        return f"{str(target.source)!r} cannot be read: {text}"


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Image u8[h,w,3] and mask u8[h,w] → u8[h',w',3], long side at most LONG_SIDE px, with class colours and borders."""
    h, w = mask.shape
    factor = min(1.0, LONG_SIDE / max(h, w))
    size = max(1, round(w * factor)), max(1, round(h * factor))
    if size != (w, h):
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
    out, colours = image.copy(), voc_palette()
    foreground = mask != BACKGROUND
    out[foreground] = np.round((1 - OPACITY) * image[foreground] + OPACITY * colours[mask[foreground]]).astype(np.uint8)
    border = np.zeros(mask.shape, bool)
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    border[1:] |= mask[1:] != mask[:-1]
    # white on the inner side, black on the outer: visible on any image
    out[border] = np.where(foreground, 255, 0).astype(np.uint8)[border][:, None]
    return out
