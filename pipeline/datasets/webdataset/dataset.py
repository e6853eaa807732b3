"""Images in tar shards, in the layout of the package webdataset: ten million of them need a thousand files."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from pipeline import class_names, image_files
from pipeline.core.config import Share
from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.problems import quantity
from pipeline.core.records import mask_of, read_bytes, shard_of
from pipeline.datasets.webdataset.shards import Member, Sample, samples_of
from pipeline.listing import IMAGE_SUFFIXES, DatasetError, duplicates, id_problem, val_by_hash

TEXT_BYTES = 2**20  # of a sample's json or cls, at most


@dataclass(frozen=True)
class Params:
    """dataset.options.

    train      the shards of split train within dataset.root, with `*` for what differs: `train-*.tar`
    val        those of split val; null: `train` names all, and val_share of their images is split val
    tags       member of a sample with its tags: `json`, or `cls`, whole numbers that count `classes` from 0
    key        of the json: its value is a list of names, or of such numbers, or a single one of them
    classes    names in the order of mask values 1, 2, …; null takes all names that occur in the json, sorted
    masks      ending of a sample's mask, for evaluation: `seg.png`; null: no sample has one
    val_share  fraction 0..1 of images in split val, by a hash of the id, where `val` is null
    """

    train: str
    val: str | None
    tags: Literal["json", "cls"]
    key: str
    classes: tuple[str, ...] | None
    masks: str | None
    val_share: Share

    def __post_init__(self) -> None:
        for name, pattern in (("train", self.train), ("val", self.val)):
            path = PurePosixPath(pattern or "x.tar")
            if path.suffix != ".tar" or path.is_absolute() or {"..", "**"} & set(path.parts) or set("\\{}") & set(str(path)):
                raise ValueError(
                    f"{name}: got {pattern!r}, allowed is a path within dataset.root that ends in .tar, "
                    "with `*` for the parts that differ: train-*.tar"
                )
        if self.tags == "cls" and self.classes is None:
            raise ValueError("classes: got null, but with `tags: cls` samples hold numbers; list the names in their order")


class Dataset:
    """Ids are <shard without .tar>/<key of the sample>, since keys are often numbers that begin anew in every shard. A path
    is <shard>.tar/<name of the image in it>.

    A sample without tags is untagged; one without an image is left out, and counted in a warning.
    DatasetError where no shard or no class is found.
    """

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self._masks: dict[str, Member] = {}  # by id
        self._listings: list[Listing] = []
        others = Counter[str]()
        without_image = 0
        for split, shard in self._shards():
            for sample in samples_of(root / shard, self.problems):
                if not self._add(sample, shard, split, others):
                    without_image += 1
        if without_image:
            self.warnings.append(f"{quantity(without_image, 'sample')} without an image left out")
        if passed_over := image_files.passed_over(dict(sorted(others.items())), "shards"):
            self.warnings.append(passed_over)
        self.labels = self._labels()

    def _shards(self) -> list[tuple[str, PurePosixPath]]:
        """(split, path) of every shard; the split is "" where val_share decides. DatasetError where there is none."""
        patterns = {"train" if self.params.val else "": self.params.train, "val": self.params.val}
        shards = [(split, shard) for split, pattern in patterns.items() if pattern for shard in self._matching(pattern)]
        both = duplicates(shard.as_posix() for _, shard in shards)
        self.problems += [f"{name}: both dataset.options.train and val name it" for name in both]
        links = image_files.links_among((Path(shard) for _, shard in shards), self.root)
        self.problems += links
        self.problems += [
            f"{shard}: only the shard may end in .tar" for _, shard in shards if shard_of(shard / "x") != shard
        ]
        if self.problems:
            raise DatasetError(self.problems)
        return shards

    def _matching(self, pattern: str) -> list[PurePosixPath]:
        found = sorted(path for path in self.root.glob(pattern) if path.is_file() or path.is_symlink())
        if not found:
            there = sorted(path.name for path in self.root.glob("*.tar*"))[:5]
            self.problems.append(f"{self.root / pattern} is no file; shards there: {', '.join(there) or 'none'}")
        return [PurePosixPath(path.relative_to(self.root).as_posix()) for path in found if not path.name.startswith(".")]

    def _add(self, sample: Sample, shard: PurePosixPath, split: str, others: Counter[str]) -> bool:
        """Lists a sample, or adds what is wrong with it. False where it has no image."""
        known = {self.params.tags, self.params.masks}
        images = [ending for ending in sample.members if f".{ending}" in IMAGE_SUFFIXES]
        others.update(f".{ending}" if ending else "" for ending in {*sample.members} - {*known, *images})
        if not images:
            return False
        image_id = _composed(f"{shard.with_suffix('')}/{sample.key}")
        problem = id_problem(sample.key) or id_problem(image_id)
        if problem is None and len(images) > 1:
            problem = f"{image_id!r}: {len(images)} images ({', '.join(images)}); a sample has one"
        if problem is not None:
            self.problems.append(problem)
            return True
        image = sample.members[images[0]]
        if self.params.masks is not None and self.params.masks in sample.members:
            self._masks[image_id] = sample.members[self.params.masks]
        self._listings.append(
            Listing(
                id=image_id,
                path=Path(shard / image.name),
                split=split or val_by_hash(image_id, self.params.val_share),
                tags=self._tags(image_id, shard, sample),
                mask=image_id in self._masks,
                offset=image.offset,
                length=image.length,
            )
        )
        return True

    def _tags(self, image_id: str, shard: PurePosixPath, sample: Sample) -> tuple[str, ...] | None:
        """None where the sample has no tags, or such as cannot be used."""
        member = sample.members.get(self.params.tags)
        if member is None:
            return None
        try:
            if member.length > TEXT_BYTES:
                raise ValueError(f"has {member.length:,} bytes; at most {TEXT_BYTES:,} are read")
            text = read_bytes(self.root / shard, member.offset, member.length).decode("utf-8-sig")
            values = text.replace(",", " ").split() if self.params.tags == "cls" else self._of_json(json.loads(text))
            return None if values is None else tuple(dict.fromkeys(self._name(value) for value in values))
        except (ValueError, RecursionError) as error:  # of decoding, too
            self.problems.append(f"{image_id!r}: {member.name} in {shard.name} {error}")
            return None

    def _of_json(self, content: Any) -> Sequence[Any] | None:
        if not isinstance(content, dict):
            raise ValueError(f"is no JSON object with a key {self.params.key!r}")
        value = content.get(self.params.key)
        return value if value is None or isinstance(value, list) else [value]

    def _name(self, value: Any) -> str:
        """A class's name, of itself or of its number as whole number or text."""
        classes = self.params.classes
        number = self.params.tags == "cls" or (isinstance(value, int) and not isinstance(value, bool))
        if number:
            if classes is None or not str(value).isdecimal() or int(value) >= len(classes):
                allowed = f"0 to {len(classes) - 1}" if classes else "names, since dataset.options.classes is null"
                raise ValueError(f"holds the tag {value!r}; allowed are {allowed}")
            return _composed(classes[int(value)])
        if not isinstance(value, str) or not value.strip() or set(",;|") & set(value):
            raise ValueError(f"holds the tag {value!r}; allowed is a list of names, one class each")
        return _composed(value.strip())

    def _labels(self) -> LabelSpace:
        """DatasetError where no class can be named."""
        seen = sorted({tag for listing in self._listings for tag in listing.tags or ()})
        names = seen if self.params.classes is None else [_composed(name) for name in self.params.classes]
        if not names and not self.problems:
            self.problems.append(f"{self.root}: no sample has a tag; dataset.options.key {self.params.key!r} must name them")
        wrong = class_names.problems(names)
        if wrong or not names:
            raise DatasetError([*self.problems, *wrong])
        return LabelSpace(tuple(names))

    def listings(self) -> list[Listing]:
        """Every image. DatasetError lists every problem."""
        if self.problems:
            raise DatasetError(self.problems, listings=self._listings)
        return self._listings

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values of the sample's mask. ValueError if it is neither palette nor 8-bit greyscale."""
        member = self._masks[listing.id]
        shard = self.root / shard_of(PurePosixPath(listing.path.as_posix()))
        return mask_of(read_bytes(shard, member.offset, member.length), member.name)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
