"""The user's own photographs: images/, tags.csv or a folder per class, and optional masks/ for evaluation."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.config import Share
from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.records import read_mask
from pipeline.listing import (
    DatasetError,
    duplicates,
    id_problem,
    images_under,
    read_table,
    split_tags,
    val_by_hash,
    without_suffix,
)


@dataclass(frozen=True)
class Params:
    """dataset.options.

    classes    names in the order of mask values 1, 2, …; null takes all names that occur in tags.csv, sorted
    val_share  fraction 0..1 of images in split val, by a hash of the id; only for images that tags.csv gives no split
    """

    classes: tuple[str, ...] | None
    val_share: Share


class Dataset:
    """Ids are paths under images/ without suffix. An image without a row in tags.csv is untagged: no method trains on it.

    DatasetError where there are no images or no class names. Other problems are collected, and raised by `listings`.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        files = images_under(root / "images")
        ids = [_composed(path.with_suffix("").as_posix()) for path in files]
        self.problems = [problem for image_id in ids if (problem := id_problem(image_id))]
        self.problems += [f"{image_id!r}: two image files have this id" for image_id in duplicates(ids)]
        self.files = dict(zip(ids, files, strict=True))
        self.tags: dict[str, tuple[str, ...]] = {}
        self.splits: dict[str, str] = {}
        table = root / "tags.csv"
        if table.is_file():
            self._read(table)
        else:
            self.tags = {
                image_id: (_composed(path.parts[0]),) for image_id, path in self.files.items() if len(path.parts) > 1
            }
        self._check_masks()
        names = sorted({tag for tags in self.tags.values() for tag in tags})
        if not names and params.classes is None:
            problem = f"{root}: no image has a tag; tags.csv or one folder per class under images/ must name some"
            raise DatasetError([*self.problems, problem])
        self.labels = LabelSpace(tuple(names if params.classes is None else map(_composed, params.classes)))

    def _read(self, table: Path) -> None:
        try:
            rows = read_table(table, ["id", "tags"])
        except DatasetError as error:
            self.problems += error.problems
            return
        ids = [name if (name := _composed(row["id"])) in self.files else without_suffix(name) for row in rows]
        self.problems += [f"{image_id!r}: stands twice in tags.csv" for image_id in duplicates(ids)]
        for image_id, row in zip(ids, rows, strict=True):
            problem = id_problem(image_id)
            if problem:
                self.problems.append(problem)
            elif image_id not in self.files:
                self.problems.append(f"{image_id!r}: in tags.csv, but no file images/{image_id}.*")
            split = row.get("split")
            if split in ("train", "val"):
                self.splits[image_id] = split
            elif split:
                self.problems.append(f"{image_id!r}: split {split!r} in tags.csv; allowed are train, val")
        self.tags = dict(zip(ids, split_tags(_composed(row["tags"]) for row in rows), strict=True))

    def _check_masks(self) -> None:
        """Adds a problem where no mask is named as an image is: evaluate would otherwise silently have no ground truth."""
        masks = images_under(self.root / "masks") if (self.root / "masks").is_dir() else []
        if masks and not any(self._mask(image_id).is_file() for image_id in self.files):
            self.problems.append(f"masks/ holds {len(masks)} images, but none is called as an image is (masks/<id>.png)")

    def listings(self) -> list[Listing]:
        """Every image under images/. DatasetError lists every problem."""
        listings = [
            Listing(
                id=image_id,
                path=Path("images") / path,
                split=self.splits.get(image_id) or val_by_hash(image_id, self.params.val_share),
                tags=self.tags.get(image_id),
                mask=self._mask(image_id).is_file(),
            )
            for image_id, path in self.files.items()
        ]
        if self.problems:
            raise DatasetError(self.problems, listings=listings)
        return listings

    def _mask(self, image_id: str) -> Path:
        return self.root / "masks" / self.files[image_id].with_suffix(".png")

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values of masks/<id>.png. ValueError if it is neither a palette nor an 8-bit greyscale image."""
        return read_mask(self._mask(listing.id))


def _composed(text: str) -> str:
    """Unicode NFC: macOS decomposes letters with accents in file names, keyboards and tables compose them."""
    return unicodedata.normalize("NFC", text)
