"""A data set by the settings of params.yaml → its images, before any is opened, and every problem of lists, ids and tags."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import class_names, image_files
from pipeline.core import config, plugins
from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.problems import listed, quantity
from pipeline.core.record_table import SPLITS
from pipeline.core.sections import Dataset
from pipeline.listing import DatasetError, duplicates, id_problem

EMPTY_TRAIN = "no usable image of split train has a tag; there is nothing to learn from"


def open_dataset(settings: Dataset) -> Any:
    """The data set that params.yaml names. DatasetError where there is nothing to list, ParamsError on wrong options."""
    module = plugins.load("datasets", settings.name)
    params = config.parse(module.Params, settings.options, "dataset.options")
    root = Path(settings.root)
    if not root.is_dir():
        hint = "set dataset.root in params.yaml; the scenes of the demo are drawn by `make data`"
        raise DatasetError([f"dataset.root {root} is no folder"], hint=hint)
    return module.Dataset(root, params)


def list_images(dataset: Any) -> tuple[list[Listing], list[str]]:
    """The images by id, without duplicates, and a text per problem of lists, ids, names and tags."""
    try:
        listings, problems = dataset.listings(), []
    except DatasetError as error:
        listings, problems = error.listings, error.problems
    dataset_problems = set(problems)
    ids = [listing.id for listing in listings]
    problems += class_names.problems(dataset.labels.names)
    problems += [problem for image_id in ids if (problem := id_problem(image_id)) and problem not in dataset_problems]
    problems += [f"{image_id!r}: two images have this id" for image_id in duplicates(ids)]
    problems += [f"{item.id!r}: split {item.split!r}; allowed are {', '.join(SPLITS)}" for item in listings
                 if item.split not in SPLITS]  # fmt: skip
    links = image_files.links_among((item.path for item in listings if not id_problem(item.path.as_posix())), dataset.root)
    problems += [problem for problem in links if problem not in dataset_problems]
    problems += _unknown_tags(listings, dataset.labels)
    if not listings and not problems:
        problems.append(f"dataset.root {dataset.root} holds no image")
    if listings and not any(listing.split == "train" and listing.tags for listing in listings) and not dataset_problems:
        problems.append(EMPTY_TRAIN)
    by_id = {listing.id: listing for listing in listings}
    return [by_id[image_id] for image_id in sorted(by_id)], problems


def _unknown_tags(listings: Sequence[Listing], labels: LabelSpace) -> list[str]:
    """A text per tag that is no class, with the images that have it and the class that it is most like."""
    images: dict[str, list[str]] = defaultdict(list)
    for listing in listings:
        for tag in labels.unknown(listing.tags or ()):
            images[tag].append(listing.id)
    texts = []
    for tag, ids in sorted(images.items()):
        nearest = class_names.nearest(tag, labels.names)
        likely = f", nearest is {nearest!r}" if nearest else ""
        known = listed(labels.names, ", ")
        texts.append(
            f"unknown tag {class_names.shortened(tag)} of {quantity(len(ids), 'image')} (first {min(ids)!r}){likely}; "
            f"known are {known}"
        )
    return texts


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
