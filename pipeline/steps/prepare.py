"""A data set's listings → records.h5 and truth.h5, after every image and mask has been opened once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import config, plugins, records, store
from pipeline.core.contracts import Listing
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.listing import DatasetError, id_problem, twice
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Dataset, Prepare

PER_ITEM = 32  # images that one process checks at a time

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Checked:
    """What opening one image and its mask has shown. problem is None where both are usable."""

    size: tuple[int, int]
    sha256: bytes
    problem: str | None


def open_dataset(settings: Dataset) -> Any:
    """The data set that params.yaml names. DatasetError or ParamsError, with everything that is wrong with lists and tags."""
    module = plugins.load("datasets", settings.name)
    params = config.parse(module.Params, settings.options, "dataset.options")
    root = Path(settings.root)
    if not root.is_dir():
        hint = "; `make data` draws it" if settings.name == "scenes" else "; set dataset.root in params.yaml"
        raise DatasetError([f"dataset.root {root} is no folder{hint}"])
    return module.Dataset(root, params)


_OPENED: dict[str, Any] = {}  # one per process; a COCO annotation file takes seconds to parse


def check_some(listings: Sequence[Listing], settings: Dataset) -> list[Checked]:
    """Opens images and masks; runs in worker processes, each of which opens the data set once."""
    key = store.digest([settings.name, settings.root, settings.options])
    if key not in _OPENED:
        _OPENED[key] = open_dataset(settings)
    return [_check(listing, _OPENED[key]) for listing in listings]


def _check(listing: Listing, dataset: Any) -> Checked:
    try:
        data = (dataset.root / listing.path).read_bytes()
        h, w = records.decode(data).shape[:2]
    except Exception as error:  # whatever a decoder throws at a broken file is that file's problem, not the run's
        return Checked((0, 0), b"\0" * 32, f"{listing.path} cannot be read: {error}")
    problem = None
    if listing.mask:
        try:
            mask = dataset.truth(listing)
            problem = _mask_problem(mask, (h, w), len(dataset.labels))
        except Exception as error:
            problem = f"its mask cannot be read: {error}"
    return Checked((h, w), hashlib.sha256(data).digest(), problem)


def _mask_problem(mask: np.ndarray, size: tuple[int, int], classes: int) -> str | None:
    if mask.shape != size:
        shape = "×".join(map(str, mask.shape))
        return f"its mask is {shape} px (h×w), the upright image {size[0]}×{size[1]}; masks are not rotated by EXIF"
    strange = np.unique(mask[(mask > classes) & (mask != IGNORE)])
    if strange.size:
        return f"its mask holds the values {strange[:10].tolist()}; allowed are 0..{classes} and {IGNORE}"
    return None


def prepare(settings: Dataset, rules: Prepare, *, digest: str, records_out: Path, truth_out: Path, mapper: Mapper) -> Records:
    """Checks everything, then writes both files. mapper(function, items) applies in order, perhaps in processes.

    Structural mistakes (lists, tags, duplicate ids) always fail. Images that cannot be used fail together, or are skipped
    and named in the records where rules.on_bad_image is `skip`.
    """
    dataset = open_dataset(settings)
    listings = sorted(dataset.listings(), key=lambda listing: listing.id)
    problems = [problem for listing in listings if (problem := id_problem(listing.id))]
    problems += [f"{image_id!r}: two images have this id" for image_id in twice(listing.id for listing in listings)]
    problems += [
        f"{listing.id!r}: unknown tag {tag!r}; known are {', '.join(dataset.labels.names)}"
        for listing in listings
        for tag in dataset.labels.unknown(listing.tags or ())
    ]
    if not listings:
        problems.append(f"dataset.root {settings.root} holds no image")
    if problems:
        raise DatasetError(problems)
    usable, skipped, masks = _check_all(listings, dataset.labels, settings, mapper)
    if skipped and rules.on_bad_image == "fail":
        hint = "(repair or remove them, or set prepare.on_bad_image to skip in params.yaml)"
        raise DatasetError([*(f"{image_id!r}: {reason}" for image_id, reason in skipped), hint])
    if not any(record.split == "train" and record.tags for record in usable):
        raise DatasetError(["no usable image of split train has a tag; there is nothing to learn from"])
    result = Records(dataset.labels, tuple(usable), tuple(skipped))
    by_id = {listing.id: listing for listing in listings}
    store.write_part(
        truth_out, store.TRUTH, ((image_id, {"mask": dataset.truth(by_id[image_id])}) for image_id in masks),
        labels=dataset.labels, part=0, parts=1, params_digest=digest, compression=rules.compression,
    )  # fmt: skip
    records.write(records_out, result)
    return result


def _check_all(
    listings: Sequence[Listing], labels: LabelSpace, settings: Dataset, mapper: Mapper
) -> tuple[list[ImageRecord], list[tuple[str, str]], list[str]]:
    chunks = [listings[at : at + PER_ITEM] for at in range(0, len(listings), PER_ITEM)]
    usable: list[ImageRecord] = []
    skipped: list[tuple[str, str]] = []
    masks: list[str] = []
    checked: Iterator[Checked] = (one for chunk in mapper(_CheckSome(settings), chunks) for one in chunk)
    for listing, one in zip(listings, checked, strict=True):
        if one.problem:
            skipped.append((listing.id, one.problem))
            continue
        tags = None if listing.tags is None else tuple(sorted(labels.index(tag) for tag in listing.tags))
        usable.append(ImageRecord(listing.id, listing.path.as_posix(), one.size, listing.split, tags, one.sha256))
        if listing.mask:
            masks.append(listing.id)
    return usable, skipped, masks


@dataclass(frozen=True)
class _CheckSome:
    """check_some with its data set bound: picklable, as worker processes need it."""

    settings: Dataset

    def __call__(self, listings: Sequence[Listing]) -> list[Checked]:
        return check_some(listings, self.settings)
