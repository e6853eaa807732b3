"""Stage prepare: a data set's listings → records.h5 and truth.h5; opens every image and mask once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import config, records, sections, store
from pipeline.core.contracts import Listing
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.problems import quantity
from pipeline.core.record_table import ImageRecord, RecordTable
from pipeline.core.records import Records
from pipeline.core.sections import Dataset, Prepare
from pipeline.jobs import survey
from pipeline.jobs.engine import Engine
from pipeline.jobs.listings import EMPTY_TRAIN, keep_audited_masks, list_images, open_dataset
from pipeline.jobs.mask_agreement import MaskAgreement
from pipeline.jobs.near_duplicates import Fingerprints, fingerprint
from pipeline.listing import DatasetError

IMAGES_PER_TASK = 32  # images that a worker opens at a time


@dataclass(frozen=True)
class FileCheck:
    """An opened image file: size (h, w) px upright, sha256 of the file, hash of its looks (near_duplicates.fingerprint).

    problem is None where it could be decoded.
    """

    size: tuple[int, int]
    sha256: bytes
    fingerprint: int
    problem: str | None


@dataclass
class CheckedImages:
    """Tables of the usable images so far, (id, reason) of those that are not, and what their pixels say of the data set."""

    agreement: MaskAgreement
    tables: list[RecordTable] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    fingerprints: Fingerprints = field(default_factory=Fingerprints)

    def warnings(self, names: Sequence[str]) -> list[str]:
        """What is likely a mistake, by sizes, masks and looks. names: the classes, in order."""
        sizes = (size for table in self.tables for size in table.sizes())
        return [*survey.size_warnings(sizes), *self.agreement.warnings(names), *self.fingerprints.warnings()]


def run(values: Mapping[str, Any], raw: Path, *, records: Path, truth: Path, engine: Engine) -> None:
    """Stage prepare, with the data set in folder `raw`. values: content of params.yaml."""
    rules = config.parse(Prepare, values["prepare"], "prepare")
    settings = replace(sections.dataset(values), root=str(raw))
    digest = store.digest([settings.name, settings.options])
    result = prepare(settings, rules, digest=digest, records_out=records, truth_out=truth, engine=engine)
    engine.info("%s usable, %d skipped", quantity(len(result), "image"), len(result.skipped))


def open_images(listings: Sequence[Listing], root: Path) -> list[FileCheck]:
    """Reads and decodes image files. Runs in worker processes; pixels are not returned."""
    return [_open_image(listing, root) for listing in listings]


def _open_image(listing: Listing, root: Path) -> FileCheck:
    try:
        data = records.read_file(listing, root)
        pixels = records.decode(data)
    except Exception as error:  # decoders raise many kinds of errors on broken files, which must not end the run
        return FileCheck((0, 0), b"\0" * 32, 0, f"{listing.path.as_posix()!r} cannot be read: {_error_text(error)}")
    h, w = pixels.shape[:2]
    return FileCheck((h, w), hashlib.sha256(data).digest(), fingerprint(pixels), None)


def _error_text(error: Exception) -> str:
    """The error's text without the memory address that Pillow gives: records hold it, and runs must give equal bytes."""
    return "not a known image format" if "cannot identify" in str(error) else f"{error or type(error).__name__}"


def prepare(
    settings: Dataset,
    rules: Prepare,
    *,
    digest: str,
    records_out: Path,
    truth_out: Path,
    engine: Engine,
) -> Records:
    """Checks everything, then writes both files. DatasetError lists every problem; then nothing is written.

    Problems of lists, tags and ids are always errors. Images and masks that cannot be used are errors where
    rules.on_bad_image is `fail`; with `skip` they are left out and named in the records. What is likely a mistake goes to
    engine.info: by lists alone before any image is opened, by pixels afterwards.
    """
    dataset = open_dataset(settings)
    listings, problems = list_images(dataset)
    if rules.audit_list is not None:
        listings, list_problems = keep_audited_masks(listings, rules.audit_list, Path(settings.root))
        problems += list_problems
    skip = rules.on_bad_image == "skip"
    if problems and skip:  # no need to open images: these problems are never skipped
        raise DatasetError(problems)
    if not problems:
        _show(survey.of_listings(listings, dataset.labels, survey.dataset_warnings(dataset)), engine)
    checked = CheckedImages(MaskAgreement(len(dataset.labels)))
    masks = _check_images(listings, dataset, Path(settings.root), engine, checked)
    draft = truth_out.with_name(truth_out.name + ".draft")
    try:
        store.write_part(
            draft, store.TRUTH, (mask for mask in masks if skip or not (problems or checked.rejected)),
            labels=dataset.labels, part=0, parts=1, params_digest=digest, compression=rules.compression,
        )  # fmt: skip
        if checked.rejected and not skip:
            hints = ["repair or remove what cannot be used, or set prepare.on_bad_image to skip in params.yaml"]
            hints += checked.agreement.warnings(dataset.labels.names)
            problems += [f"{image_id!r}: {reason}" for image_id, reason in checked.rejected]
            raise DatasetError(problems, hint="\n".join(hints))
        if not problems and not any(len(table.of_split("train").with_classes()) for table in checked.tables):
            problems.append(EMPTY_TRAIN)
        if problems:
            raise DatasetError(problems)
        for warning in checked.warnings(dataset.labels.names):
            engine.info("warning: %s", warning)
        result = Records(dataset.labels, RecordTable.joined(checked.tables), tuple(checked.rejected))
        records.write(records_out, result)
        draft.replace(truth_out)
    finally:
        draft.unlink(missing_ok=True)
    return result


def _show(seen: survey.Survey, engine: Engine) -> None:
    for line in [*seen.lines(), *(f"warning: {warning}" for warning in seen.warnings)]:
        engine.info("%s", line)


def _check_images(
    listings: Sequence[Listing], dataset: Any, root: Path, engine: Engine, checked: CheckedImages
) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Fills `checked` in the order of listings, by id, and yields id and mask of every usable image that has a mask.

    Workers open the images. Masks are read in this process, since COCO's are in one large file that is best parsed once.
    """
    tasks = [listings[at : at + IMAGES_PER_TASK] for at in range(0, len(listings), IMAGES_PER_TASK)]
    batches = engine.map_parts(partial(open_images, root=root), tasks, what="prepare", images=len)
    for task, files in zip(tasks, batches, strict=True):
        usable: list[ImageRecord] = []
        for listing, file in zip(task, files, strict=True):
            mask, problem = None, file.problem
            if listing.mask and problem is None:
                mask, problem = _read_mask(listing, dataset, file.size, checked.agreement)
            if problem is not None:
                checked.rejected.append((listing.id, problem))
                continue
            tags = _tag_indices(listing, dataset.labels)
            usable.append(ImageRecord(
                listing.id, listing.path.as_posix(), file.size, listing.split, tags, file.sha256, listing.offset,
                listing.length,
            ))  # fmt: skip
            checked.fingerprints.add(listing.id, listing.split, file.fingerprint)
            if mask is not None:
                yield listing.id, {"mask": mask}
        checked.tables.append(RecordTable.of(usable))


def _tag_indices(listing: Listing, labels: LabelSpace) -> tuple[int, ...] | None:
    """Class indices from 0, ascending; None where the image is untagged. Unknown tags, reported before, are skipped."""
    if listing.tags is None:
        return None
    return tuple(sorted(labels.index(tag) for tag in set(listing.tags) if tag in labels.names))


def _read_mask(
    listing: Listing, dataset: Any, size: tuple[int, int], agreement: MaskAgreement
) -> tuple[np.ndarray | None, str | None]:
    """u8[h,w] mask values and None, or None and what is wrong with it. The values of a tagged image go to `agreement`."""
    try:
        mask = dataset.truth(listing)
    except Exception as error:  # as with images: a broken mask must not end the run
        return None, f"its mask cannot be read: {_error_text(error)}"
    if mask.shape != size:
        shape = "×".join(map(str, mask.shape))
        return None, f"its mask is {shape} px (h×w), the upright image {size[0]}×{size[1]}; masks are not rotated by EXIF"
    classes = len(dataset.labels)
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=IGNORE + 1))
    tags = _tag_indices(listing, dataset.labels)
    if tags is not None:
        agreement.add(values, tags)
    unknown = values[(values > classes) & (values != IGNORE)]
    if unknown.size:
        return None, f"its mask holds the values {unknown[:10].tolist()}; allowed are 0..{classes} and {IGNORE}"
    return mask, None
