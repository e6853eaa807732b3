"""Stage prepare: a data set's listings → records.h5 and truth.h5; opens every image and mask once."""

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
from pipeline.listing import DatasetError, duplicates, id_problem

IMAGES_PER_TASK = 32  # images that a worker opens at a time
EMPTY_TRAIN = "no usable image of split train has a tag; there is nothing to learn from"

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class FileCheck:
    """An opened image file: size (h, w) px upright, sha256 of the file. problem is None where it could be decoded."""

    size: tuple[int, int]
    sha256: bytes
    problem: str | None


@dataclass
class CheckedImages:
    """Records of the usable images so far, and (id, reason) of those that are not."""

    usable: list[ImageRecord] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def run(values: Mapping[str, Any], raw: Path, *, records: Path, truth: Path, engine: Engine) -> None:
    """Stage prepare, with the data set in folder `raw`. values: content of params.yaml."""
    rules = config.parse(Prepare, values["prepare"], "prepare")
    settings = replace(sections.dataset(values), root=str(raw))
    digest = store.digest([settings.name, settings.options])
    mapper = partial(engine.each, what="prepare", unit=IMAGES_PER_TASK)
    result = prepare(settings, rules, digest=digest, records_out=records, truth_out=truth, mapper=mapper)
    engine.info(
        "%d images (%d train, %d val), %d classes, %d skipped",
        len(result), len(result.split("train")), len(result.split("val")), len(result.labels), len(result.skipped),
    )  # fmt: skip


def open_dataset(settings: Dataset) -> Any:
    """The data set that params.yaml names. DatasetError where there is nothing to list, ParamsError on wrong options."""
    module = plugins.load("datasets", settings.name)
    params = config.parse(module.Params, settings.options, "dataset.options")
    root = Path(settings.root)
    if not root.is_dir():
        hint = "set dataset.root in params.yaml; the scenes of the demo are drawn by `make data`"
        raise DatasetError([f"dataset.root {root} is no folder"], hint=hint)
    return module.Dataset(root, params)


def open_images(paths: Sequence[Path], root: Path) -> list[FileCheck]:
    """Reads and decodes image files, `paths` relative to root. Runs in worker processes; pixels are not returned."""
    return [_open_image(path, root) for path in paths]


def _open_image(path: Path, root: Path) -> FileCheck:
    try:
        data = (root / path).read_bytes()
        h, w = records.decode(data).shape[:2]
    except Exception as error:  # decoders raise many kinds of errors on broken files, which must not end the run
        return FileCheck((0, 0), b"\0" * 32, f"{path.as_posix()!r} cannot be read: {_error_text(error)}")
    return FileCheck((h, w), hashlib.sha256(data).digest(), None)


def _error_text(error: Exception) -> str:
    """The error's text without the memory address that Pillow gives: records hold it, and runs must give equal bytes."""
    return "not a known image format" if "cannot identify" in str(error) else f"{error or type(error).__name__}"


def prepare(
    settings: Dataset, rules: Prepare, *, digest: str, records_out: Path, truth_out: Path, mapper: Mapper
) -> Records:
    """Checks everything, then writes both files. DatasetError lists every problem; then nothing is written.

    Problems of lists, tags and ids are always errors. Images and masks that cannot be used are errors where
    rules.on_bad_image is `fail`; with `skip` they are left out and named in the records. mapper(function, items) returns
    results in the order of items, perhaps from several processes.
    """
    dataset = open_dataset(settings)
    listings, problems = _list_images(dataset)
    if rules.audit_list is not None:
        listings, list_problems = keep_audited_masks(listings, rules.audit_list, Path(settings.root))
        problems += list_problems
    skip = rules.on_bad_image == "skip"
    if problems and skip:  # no need to open images: these problems are never skipped
        raise DatasetError(problems)
    checked = CheckedImages()
    masks = _check_images(listings, dataset, Path(settings.root), mapper, checked)
    draft = truth_out.with_name(truth_out.name + ".draft")
    try:
        store.write_part(
            draft, store.TRUTH, (mask for mask in masks if skip or not (problems or checked.rejected)),
            labels=dataset.labels, part=0, parts=1, params_digest=digest, compression=rules.compression,
        )  # fmt: skip
        if checked.rejected and not skip:
            hint = "repair or remove what cannot be used, or set prepare.on_bad_image to skip in params.yaml"
            raise DatasetError([*problems, *(f"{image_id!r}: {reason}" for image_id, reason in checked.rejected)], hint=hint)
        if not any(record.split == "train" and record.tags for record in checked.usable) and EMPTY_TRAIN not in problems:
            problems.append(EMPTY_TRAIN)
        if problems:
            raise DatasetError(problems)
        result = Records(dataset.labels, tuple(checked.usable), tuple(checked.rejected))
        records.write(records_out, result)
        draft.replace(truth_out)
    finally:
        draft.unlink(missing_ok=True)
    return result


def _list_images(dataset: Any) -> tuple[list[Listing], list[str]]:
    """The images by id, without duplicates, and a text per problem of lists, ids and tags."""
    try:
        listings, problems = dataset.listings(), []
    except DatasetError as error:
        listings, problems = error.listings, error.problems
    dataset_problems = set(problems)
    ids = [listing.id for listing in listings]
    problems += [problem for image_id in ids if (problem := id_problem(image_id)) and problem not in dataset_problems]
    problems += [f"{image_id!r}: two images have this id" for image_id in duplicates(ids)]
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
    by_id = {listing.id: listing for listing in listings}
    return [by_id[image_id] for image_id in sorted(by_id)], problems


def keep_audited_masks(listings: Sequence[Listing], name: str, root: Path) -> tuple[list[Listing], list[str]]:
    """Listings of which only those with ids in the file root/name keep their masks, and a text per problem of that file.

    Ids are compared in Unicode NFC, as data sets give them.
    """
    key = f"prepare.audit_list {name!r}"
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return [*listings], [
            f"{key}: must lie under dataset.root, without `..`, or a change would go unseen (edit params.yaml)"
        ]
    try:
        lines = (root / name).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        return [*listings], [
            f"{key}: {root / name} cannot be read as UTF-8 text ({error}); give a file or null in params.yaml"
        ]
    audited = {unicodedata.normalize("NFC", line.strip()) for line in lines if line.strip()}
    masks = {unicodedata.normalize("NFC", listing.id): listing.mask for listing in listings}
    problems = [f"{image_id!r}: in {name}, but no image has this id" for image_id in sorted(audited - set(masks))]
    unmasked = [image_id for image_id in sorted(audited & set(masks)) if not masks[image_id]]
    problems += [f"{image_id!r}: in {name}, but it has no mask" for image_id in unmasked]
    if not audited:
        problems.append(f"{key}: names no image; write one id per line, or null in params.yaml")
    return [
        replace(listing, mask=listing.mask and unicodedata.normalize("NFC", listing.id) in audited) for listing in listings
    ], problems


def _check_images(
    listings: Sequence[Listing], dataset: Any, root: Path, mapper: Mapper, checked: CheckedImages
) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Fills `checked` in the order of listings, and yields id and mask of every usable image that has a mask.

    Workers open the images. Masks are read in this process, since COCO's are in one large file that is best parsed once.
    """
    paths = [listing.path for listing in listings]
    chunks = [paths[at : at + IMAGES_PER_TASK] for at in range(0, len(paths), IMAGES_PER_TASK)]
    files: Iterator[FileCheck] = (file for batch in mapper(partial(open_images, root=root), chunks) for file in batch)
    for listing, file in zip(listings, files, strict=True):
        mask, problem = None, file.problem
        if listing.mask and problem is None:
            mask, problem = _read_mask(listing, dataset, file.size)
        if problem is not None:
            checked.rejected.append((listing.id, problem))
            continue
        tags = _tag_indices(listing, dataset.labels)
        path = listing.path.as_posix()
        checked.usable.append(ImageRecord(listing.id, path, file.size, listing.split, tags, file.sha256))
        if mask is not None:
            yield listing.id, {"mask": mask}


def _tag_indices(listing: Listing, labels: LabelSpace) -> tuple[int, ...] | None:
    """Class indices from 0, ascending; None where the image is untagged. Unknown tags, reported before, are skipped."""
    if listing.tags is None:
        return None
    return tuple(sorted(labels.index(tag) for tag in set(listing.tags) if tag in labels.names))


def _read_mask(listing: Listing, dataset: Any, size: tuple[int, int]) -> tuple[np.ndarray | None, str | None]:
    """u8[h,w] mask values and None, or None and what is wrong with the mask."""
    try:
        mask = dataset.truth(listing)
    except Exception as error:  # as with images: a broken mask must not end the run
        return None, f"its mask cannot be read: {_error_text(error)}"
    if mask.shape != size:
        shape = "×".join(map(str, mask.shape))
        return None, f"its mask is {shape} px (h×w), the upright image {size[0]}×{size[1]}; masks are not rotated by EXIF"
    classes = len(dataset.labels)
    unknown = np.unique(mask[(mask > classes) & (mask != IGNORE)])
    if unknown.size:
        return None, f"its mask holds the values {unknown[:10].tolist()}; allowed are 0..{classes} and {IGNORE}"
    return mask, None
