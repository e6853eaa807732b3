"""Your own photographs: images/ and tags.csv (or one folder per class), and optional masks/ for the audit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.core.config import Share
from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.listing import (
    DatasetError,
    id_problem,
    images_under,
    read_mask,
    read_table,
    split_tags,
    twice,
    val_by_hash,
    without_suffix,
)


@dataclass(frozen=True)
class Params:
    """dataset.options.

    classes    names in the order of mask values 1, 2, …; null takes all names seen in the tags, sorted
    val_share  share of the images that go to val, by a hash of the id; only used where tags.csv has no column split
    """

    classes: tuple[str, ...] | None
    val_share: Share


class Dataset:
    """Ids are paths under images/ without suffix. An image that tags.csv does not list is untagged: it does not train."""

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        files = images_under(root / "images")
        problems = [problem for path in files if (problem := id_problem(path.with_suffix("").as_posix()))]
        ids = [path.with_suffix("").as_posix() for path in files]
        problems += [f"{image_id!r}: two image files have this id" for image_id in twice(ids)]
        self.files = dict(zip(ids, files, strict=True))
        table = root / "tags.csv"
        tags, splits, more = self._from_table(table) if table.is_file() else (self._from_folders(), {}, [])
        problems += more
        seen = sorted({tag for row in tags.values() for tag in row})
        if not seen and params.classes is None:
            problems.append(f"{root}: no image has a tag; tags.csv or one folder per class under images/ must name some")
        names = params.classes if params.classes is not None else tuple(seen)
        for image_id, row in tags.items():
            problems += [f"{image_id!r}: unknown tag {tag!r}; known are {', '.join(names)}" for tag in row if tag not in names]
        if problems:
            raise DatasetError(problems)
        self.labels = LabelSpace(tuple(names))
        self.tags, self.splits = tags, splits

    def _from_table(self, table: Path) -> tuple[dict[str, tuple[str, ...]], dict[str, str], list[str]]:
        rows = read_table(table, ["id", "tags"])
        ids = [row["id"] if row["id"] in self.files else without_suffix(row["id"]) for row in rows]
        problems = [f"{image_id!r}: stands twice in tags.csv" for image_id in twice(ids)]
        problems += [problem for image_id in ids if (problem := id_problem(image_id))]
        problems += [
            f"{image_id!r}: in tags.csv, but no file images/{image_id}.*"
            for image_id in ids
            if image_id not in self.files and not id_problem(image_id)
        ]
        splits = {image_id: row["split"] for image_id, row in zip(ids, rows, strict=True) if row.get("split")}
        problems += [
            f"{image_id!r}: split {split!r} in tags.csv; allowed are train, val"
            for image_id, split in splits.items()
            if split not in ("train", "val")
        ]
        return dict(zip(ids, split_tags(row["tags"] for row in rows), strict=True)), splits, problems

    def _from_folders(self) -> dict[str, tuple[str, ...]]:
        return {image_id: (path.parts[0],) for image_id, path in self.files.items() if len(path.parts) > 1}

    def listings(self) -> list[Listing]:
        return [
            Listing(
                id=image_id,
                path=Path("images") / path,
                split=self.splits.get(image_id) or val_by_hash(image_id, self.params.val_share),
                tags=self.tags.get(image_id),
                mask=self._mask(image_id).is_file(),
            )
            for image_id, path in self.files.items()
        ]

    def _mask(self, image_id: str) -> Path:
        return self.root / "masks" / f"{image_id}.png"

    def truth(self, listing: Listing) -> np.ndarray:
        """masks/<id>.png: palette or greyscale, 0 background, i + 1 = classes[i], 255 ignore."""
        return read_mask(self._mask(listing.id))
