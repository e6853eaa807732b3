"""Stage prepare: a data set's listings → records.h5 and truth.h5, after every image and mask has been opened once."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import config, plugins, records, sections, store
from pipeline.core.contracts import Listing
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import SPLITS, ImageRecord, Records
from pipeline.core.sections import Dataset, Prepare
from pipeline.jobs.engine import Engine
from pipeline.listing import DatasetError, id_problem, twice

PER_ITEM = 32  # images that one process opens at a time
EMPTY_TRAIN = "no usable image of split train has a tag; there is nothing to learn from"

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Opened:
    """What opening one image file has shown: size (h, w) px upright. problem is None where it can be read whole."""

    size: tuple[int, int]
    sha256: bytes
    problem: str | None


@dataclass
class Found:
    """What has been seen so far: records that are usable, (id, reason) of what is not."""

    usable: list[ImageRecord] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)


def run(values: Mapping[str, Any], raw: Path, *, records: Path, truth: Path, engine: Engine) -> None:
    """Stage prepare, with the data set at `raw`. values: of params.yaml."""
    rules = config.parse(Prepare, values["prepare"], "prepare")
    settings = replace(sections.dataset(values), root=str(raw))
    digest = store.digest([settings.name, settings.options])
    mapper = partial(engine.each, what="prepare", unit=PER_ITEM)
    found = prepare(settings, rules, digest=digest, records_out=records, truth_out=truth, mapper=mapper)
    engine.info(
        "%d images (%d train, %d val), %d classes, %d skipped",
        len(found), len(found.split("train")), len(found.split("val")), len(found.labels), len(found.skipped),
    )  # fmt: skip


def open_dataset(settings: Dataset) -> Any:
    """The data set that params.yaml names. DatasetError or ParamsError where nothing could be listed."""
    module = plugins.load("datasets", settings.name)
    params = config.parse(module.Params, settings.options, "dataset.options")
    root = Path(settings.root)
    if not root.is_dir():
        hint = "set dataset.root in params.yaml; the scenes of the demo are drawn by `make data`"
        raise DatasetError([f"dataset.root {root} is no folder"], hint=hint)
    return module.Dataset(root, params)


def open_images(paths: Sequence[Path], root: Path) -> list[Opened]:
    """Reads and decodes image files, `paths` relative to root; runs in worker processes and keeps no pixels."""
    return [_open_image(path, root) for path in paths]


def _open_image(path: Path, root: Path) -> Opened:
    try:
        data = (root / path).read_bytes()
        h, w = records.decode(data).shape[:2]
    except Exception as error:  # whatever a decoder throws at a broken file is that file's problem, not the run's
        return Opened((0, 0), b"\0" * 32, f"{path.as_posix()!r} cannot be read: {_in_words(error)}")
    return Opened((h, w), hashlib.sha256(data).digest(), None)


def _in_words(error: Exception) -> str:
    """Pillow names its in-memory buffer, whose address would make each run's records differ."""
    return "not a known image format" if "cannot identify" in str(error) else f"{error or type(error).__name__}"


def prepare(
    settings: Dataset, rules: Prepare, *, digest: str, records_out: Path, truth_out: Path, mapper: Mapper
) -> Records:
    """Checks everything, then writes both files; nothing is written where something is wrong.

    mapper(function, items) applies in order, perhaps in processes. Structural mistakes (lists, tags, duplicate ids) always
    fail; images and masks that cannot be used fail with them, or are skipped and named in the records where
    rules.on_bad_image is `skip`. One DatasetError lists it all.
    """
    dataset = open_dataset(settings)
    listings, problems = _listed(dataset)
    if rules.audit_list is not None:
        listings, wrong = audited(listings, rules.audit_list, Path(settings.root))
        problems += wrong
    skip = rules.on_bad_image == "skip"
    if problems and skip:  # no need to open images: these mistakes are never skipped
        raise DatasetError(problems)
    found = Found()
    masks = _checked(listings, dataset, Path(settings.root), mapper, found)
    draft = truth_out.with_name(truth_out.name + ".draft")
    try:
        store.write_part(
            draft, store.TRUTH, (mask for mask in masks if skip or not (problems or found.bad)), labels=dataset.labels,
            part=0, parts=1, params_digest=digest, compression=rules.compression,
        )  # fmt: skip
        if found.bad and not skip:
            hint = "repair or remove what cannot be used, or set prepare.on_bad_image to skip in params.yaml"
            raise DatasetError([*problems, *(f"{image_id!r}: {reason}" for image_id, reason in found.bad)], hint=hint)
        if not any(record.split == "train" and record.tags for record in found.usable) and EMPTY_TRAIN not in problems:
            problems.append(EMPTY_TRAIN)
        if problems:
            raise DatasetError(problems)
        result = Records(dataset.labels, tuple(found.usable), tuple(found.bad))
        records.write(records_out, result)
        draft.replace(truth_out)
    finally:
        draft.unlink(missing_ok=True)
    return result


def _listed(dataset: Any) -> tuple[list[Listing], list[str]]:
    """The images in id order, each id once, and what is wrong with lists, ids and tags."""
    try:
        listings, problems = dataset.listings(), []
    except DatasetError as error:
        listings, problems = error.listings, error.problems
    told = set(problems)
    ids = [listing.id for listing in listings]
    problems += [problem for image_id in ids if (problem := id_problem(image_id)) and problem not in told]
    problems += [f"{image_id!r}: two images have this id" for image_id in twice(ids)]
    for listing in listings:
        unknown = dataset.labels.unknown(listing.tags or ())
        if unknown:
            known = ", ".join(dataset.labels.names)
            problems.append(f"{listing.id!r}: unknown tag {', '.join(map(repr, unknown))}; known are {known}")
        if listing.split not in SPLITS:
            problems.append(f"{listing.id!r}: split {listing.split!r}; allowed are {', '.join(SPLITS)}")
    if not listings and not problems:
        problems.append(f"dataset.root {dataset.root} holds no image")
    if listings and not any(listing.split == "train" and listing.tags for listing in listings):
        problems.append(EMPTY_TRAIN)
    once = {listing.id: listing for listing in listings}
    return [once[image_id] for image_id in sorted(once)], problems


def audited(listings: Sequence[Listing], name: str, root: Path) -> tuple[list[Listing], list[str]]:
    """The listings, of which only those that the file root/name names keep their masks, and what is wrong with that file."""
    where = f"prepare.audit_list {name!r}"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [*listings], [
            f"{where}: must lie under dataset.root, without `..`, or a change would go unseen (edit params.yaml)"
        ]
    try:
        lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [*listings], [
            f"{where}: {root / name} cannot be read as UTF-8 text ({error}); give a file or null in params.yaml"
        ]
    named = {unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()}
    masks = {unicodedata.normalize("NFC", listing.id): listing.mask for listing in listings}
    problems = [f"{one!r}: in {name}, but no image has this id" for one in sorted(named - set(masks))]
    problems += [f"{one!r}: in {name}, but it has no mask" for one in sorted(named & set(masks)) if not masks[one]]
    if not named:
        problems.append(f"{where}: names no image; write one id per line, or null in params.yaml")
    kept = [replace(one, mask=one.mask and unicodedata.normalize("NFC", one.id) in named) for one in listings]
    return kept, problems


def _checked(
    listings: Sequence[Listing], dataset: Any, root: Path, mapper: Mapper, found: Found
) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Fills `found` in id order and yields the masks of usable images, one at a time.

    Workers open the images; masks are read here, since COCO's lie in one large file that is best parsed once.
    """
    paths = [listing.path for listing in listings]
    chunks = [paths[at : at + PER_ITEM] for at in range(0, len(paths), PER_ITEM)]
    opened: Iterator[Opened] = (one for chunk in mapper(partial(open_images, root=root), chunks) for one in chunk)
    for listing, image in zip(listings, opened, strict=True):
        mask, problem = None, image.problem
        if listing.mask and problem is None:
            mask, problem = _mask(listing, dataset, image.size)
        if problem is not None:
            found.bad.append((listing.id, problem))
            continue
        known = _positions(listing, dataset.labels)
        found.usable.append(ImageRecord(listing.id, listing.path.as_posix(), image.size, listing.split, known, image.sha256))
        if mask is not None:
            yield listing.id, {"mask": mask}


def _positions(listing: Listing, labels: LabelSpace) -> tuple[int, ...] | None:
    """Sorted class positions; unknown tags have been reported by now and are passed over."""
    if listing.tags is None:
        return None
    return tuple(sorted(labels.index(tag) for tag in set(listing.tags) if tag in labels.names))


def _mask(listing: Listing, dataset: Any, size: tuple[int, int]) -> tuple[np.ndarray | None, str | None]:
    """The mask and None, or None and what is wrong with it."""
    try:
        mask = dataset.truth(listing)
    except Exception as error:  # as with images: a broken mask is that image's problem
        return None, f"its mask cannot be read: {_in_words(error)}"
    if mask.shape != size:
        shape = "×".join(map(str, mask.shape))
        return None, f"its mask is {shape} px (h×w), the upright image {size[0]}×{size[1]}; masks are not rotated by EXIF"
    classes = len(dataset.labels)
    strange = np.unique(mask[(mask > classes) & (mask != IGNORE)])
    if strange.size:
        return None, f"its mask holds the values {strange[:10].tolist()}; allowed are 0..{classes} and {IGNORE}"
    return mask, None
