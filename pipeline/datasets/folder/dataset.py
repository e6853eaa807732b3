"""The user's own photographs: a folder of images, a table of tags or a folder per class, and masks/ for evaluation."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline import class_names, image_files
from pipeline.core.config import Share
from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.records import read_mask
from pipeline.listing import DatasetError, duplicates, id_problem, val_by_hash, without_suffix
from pipeline.tag_table import SPLITS, read_table, split_tags

TABLE, MASKS = "tags.csv", "masks"  # in dataset.root
TABLES = PurePosixPath("data/tags")  # a folder of the project and a dep of prepare, so that no change goes unseen


@dataclass(frozen=True)
class Params:
    """dataset.options.

    images     the folder of the images within dataset.root; `.` where they lie in dataset.root itself
    tags       null for tags.csv in dataset.root or, without one, a folder per class; else a table data/tags/… of the project
    classes    names in the order of mask values 1, 2, …; null takes all names that occur in the tags, sorted
    val_share  fraction 0..1 of images in split val, by a hash of the id; only for images that the table gives no split
    """

    images: str
    tags: str | None
    classes: tuple[str, ...] | None
    val_share: Share

    def __post_init__(self) -> None:
        images = PurePosixPath(self.images)
        if not self.images or images.is_absolute() or ".." in images.parts or "\\" in self.images:
            raise ValueError(f"images: got {self.images!r}, allowed is a folder within dataset.root, or `.` for itself")
        if images.parts[:1] == (MASKS,):
            raise ValueError(f"images: got {self.images!r}, but {MASKS}/ of dataset.root holds masks")
        tags = TABLES / TABLE if self.tags is None else PurePosixPath(self.tags)
        if not tags.is_relative_to(TABLES) or tags == TABLES or ".." in tags.parts or "\\" in str(tags):
            raise ValueError(
                f"tags: got {self.tags!r}, allowed is null, or a file in {TABLES}/ of the project, where DVC sees changes"
            )


class Dataset:
    """Ids are paths under the images' folder without suffix. An image without a row in the table is untagged: no method
    trains on it.

    DatasetError where there are no images or no class names. Other problems are collected, and raised by `listings`.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        self.tags: dict[str, tuple[str, ...]] = {}
        self.splits: dict[str, str] = {}
        self.warnings: list[str] = []
        self.problems: list[str] = []
        self.files = self._files()
        table = root / TABLE if params.tags is None else Path(params.tags)
        if params.tags is not None or table.is_file() or table.is_symlink():
            self._read(table)
        else:
            self.tags = {
                image_id: (_composed(path.parts[0]),) for image_id, path in self.files.items() if len(path.parts) > 1
            }
        self._check_masks()
        self.labels = self._labels(table)

    def _files(self) -> dict[str, Path]:
        """Id → path of the image under the images' folder. DatasetError where there is none."""
        folder = self.root / self.params.images
        if not folder.is_dir():
            own = image_files.content_of(self.root, self.root, {self.root / MASKS}).images
            hint = f"the images lie in {self.root} itself, set it to `.`" if own else "edit params.yaml"
            raise DatasetError([f"folder {folder} is missing: dataset.options.images names it; {hint}"])
        content = image_files.content_of(folder, self.root, {self.root / TABLE, self.root / MASKS})
        self.links = content.problems
        self.problems += self.links
        passed_over = image_files.passed_over(content.others, f"{folder}/")
        if passed_over:
            self.warnings.append(passed_over)
        if not content.images:
            raise DatasetError([*self.problems, f"{folder} holds no image{f': {passed_over}' if passed_over else ''}"])
        ids = [_composed(path.with_suffix("").as_posix()) for path in content.images]
        self.problems += [problem for image_id in ids if (problem := id_problem(image_id))]
        self.problems += [f"{image_id!r}: two image files have this id" for image_id in duplicates(ids)]
        return dict(zip(ids, content.images, strict=True))

    def _read(self, table: Path) -> None:
        """Fills tags and splits from the table, or adds what is wrong with it."""
        links = image_files.links_to(table, self.root if self.params.tags is None else Path(TABLES))
        if links:
            self.problems += links
            return
        try:
            rows = read_table(table, ["id", "tags"])
            tags = split_tags((_composed(row["tags"]) for row in rows), tuple(map(_composed, self.params.classes or ())))
        except DatasetError as error:
            self.problems += error.problems
            return
        ids = [name if (name := _composed(row["id"])) in self.files else without_suffix(name) for row in rows]
        self.problems += [f"{image_id!r}: stands twice in {table.name}" for image_id in duplicates(ids)]
        for image_id, row in zip(ids, rows, strict=True):
            problem = id_problem(image_id)
            if problem:
                self.problems.append(problem)
            elif image_id not in self.files and not self.links:  # behind a link it may well be
                file = (PurePosixPath(self.params.images) / f"{image_id}.*").as_posix()
                self.problems.append(f"{image_id!r}: in {table.name}, but no file {file}")
            split = row.get("split", "")
            if split.casefold() in SPLITS:
                self.splits[image_id] = SPLITS[split.casefold()]
            elif split:
                self.problems.append(f"{image_id!r}: split {split!r} in {table.name}; allowed are train, val")
        self.tags = dict(zip(ids, tags, strict=True))

    def _check_masks(self) -> None:
        """Adds a problem where no mask is named as an image is: evaluate would otherwise silently have no ground truth."""
        folder = self.root / MASKS
        if not folder.is_dir():
            return
        content = image_files.content_of(folder, self.root)
        self.problems += content.problems
        if content.images and not any(self._mask(image_id).is_file() for image_id in self.files):
            self.problems.append(
                f"{MASKS}/ holds {len(content.images)} images, but none is called as an image is ({MASKS}/<id>.png)"
            )

    def _labels(self, table: Path) -> LabelSpace:
        """DatasetError where no class can be named."""
        seen = sorted({tag for tags in self.tags.values() for tag in tags})
        names = seen if self.params.classes is None else [_composed(name) for name in self.params.classes]
        if not names and not self.problems:
            tables = ", ".join(sorted(path.name for path in self.root.glob("*.csv"))) or "none"
            self.problems.append(
                f"{self.root}: no image has a tag; {table} or one folder per class must name some (tables there: {tables})"
            )
        wrong = class_names.problems(names)
        if wrong or not names:
            raise DatasetError([*self.problems, *wrong])
        return LabelSpace(tuple(names))

    def listings(self) -> list[Listing]:
        """Every image. DatasetError lists every problem."""
        listings = [
            Listing(
                id=image_id,
                path=self.params.images / path,
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
        return self.root / MASKS / self.files[image_id].with_suffix(".png")

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values of masks/<id>.png. ValueError if it is neither a palette nor an 8-bit greyscale image."""
        return read_mask(self._mask(listing.id))


def _composed(text: str) -> str:
    """Unicode NFC: macOS decomposes letters with accents in file names, keyboards and tables compose them."""
    return unicodedata.normalize("NFC", text)
