"""PASCAL VOC 2012 in its official layout, with the train_aug list and masks of SBD where they are present."""

from __future__ import annotations

import pickle
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.core.contracts import Listing
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import read_mask
from pipeline.listing import DatasetError, duplicates, id_problem, without_suffix
from pipeline.tag_table import read_table, split_tags

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
LISTS = Path("ImageSets/Segmentation")
OWN, SBD = "SegmentationClass", "SegmentationClassAug"


@dataclass(frozen=True)
class Params:
    """dataset.options.

    train_list, val_list  names in ImageSets/Segmentation without .txt
    tags     source of the image-level tags: xml (Annotations/), csv (tags.csv) or npy (cls_labels.npy, as WSSS code uses it)
    classes  null for all 20, or a subset of VOC's names; other classes become background and their tags are dropped
    """

    train_list: str
    val_list: str
    tags: Literal["xml", "csv", "npy"]
    classes: tuple[str, ...] | None

    def __post_init__(self) -> None:
        unknown = [name for name in self.classes or () if name not in VOC_CLASSES]
        if unknown:
            raise ValueError(f"classes: {', '.join(unknown)} are no VOC names; allowed are {', '.join(VOC_CLASSES)}")


class Dataset:
    """Ids are VOC's, as in its lists. Classes keep VOC's order."""

    def __init__(self, root: Path, params: Params) -> None:
        self.root, self.params = root, params
        names = set(params.classes if params.classes is not None else VOC_CLASSES)
        self.labels = LabelSpace(tuple(name for name in VOC_CLASSES if name in names))
        self._mask_value = np.zeros(256, np.uint8)  # by VOC's value
        self._mask_value[IGNORE] = IGNORE
        for value, name in enumerate(VOC_CLASSES, 1):
            self._mask_value[value] = self.labels.index(name) + 1 if name in names else BACKGROUND

    def listings(self) -> list[Listing]:
        """Every image of the two lists. DatasetError lists every problem of lists, files and tags."""
        problems: list[str] = []
        splits = {"train": self._list(self.params.train_list, problems), "val": self._list(self.params.val_list, problems)}
        all_ids = [image_id for ids in splits.values() for image_id in ids]
        problems += [f"{image_id!r}: stands twice in the lists" for image_id in duplicates(all_ids)]
        problems += [problem for image_id in all_ids if (problem := id_problem(image_id))]
        split_of = {image_id: split for split, ids in splits.items() for image_id in ids if not id_problem(image_id)}
        present = {image_id for image_id in split_of if (self.root / _photograph(image_id)).is_file()}
        problems += [
            f"{image_id!r}: in a list, but {_photograph(image_id)} is missing"
            for image_id in split_of
            if image_id not in present
        ]
        try:
            tags = self._tags(list(split_of), problems)
        except DatasetError as error:
            tags, problems = {}, [*problems, *error.problems]
        listings = [
            Listing(
                id=image_id,
                path=_photograph(image_id),
                split=split,
                tags=None if image_id not in tags else tuple(name for name in tags[image_id] if name in self.labels.names),
                mask=self._mask(image_id, split) is not None,
            )
            for image_id, split in split_of.items()
            if image_id in present
        ]
        if problems:
            raise DatasetError(problems, listings=listings)
        return listings

    def truth(self, listing: Listing) -> np.ndarray:
        """u8[h,w] mask values of the label space; VOC's void border is IGNORE. ValueError on values unknown to VOC."""
        path = self._mask(listing.id, listing.split)
        assert path is not None  # listing.mask said so
        mask = read_mask(path)
        unknown = np.unique(mask[(mask > len(VOC_CLASSES)) & (mask != IGNORE)])
        if unknown.size:
            raise ValueError(f"mask {path.name} holds {unknown.tolist()}, which are no VOC values")
        return self._mask_value[mask]

    def _mask(self, image_id: str, split: str) -> Path | None:
        """For train_aug the mask of SBD where it is present; for VOC's own lists VOC's mask, as its protocol asks."""
        augmented = split == "train" and "aug" in self.params.train_list
        candidates = (self.root / folder / f"{image_id}.png" for folder in ((SBD, OWN) if augmented else (OWN, SBD)))
        return next((path for path in candidates if path.is_file()), None)

    def _list(self, name: str, problems: list[str]) -> list[str]:
        """Ids of a list, whose lines are ids or SBD's `/JPEGImages/x.jpg /SegmentationClassAug/x.png`."""
        path = self.root / LISTS / f"{name}.txt"
        if not path.is_file():
            names = ", ".join(sorted(file.stem for file in (self.root / LISTS).glob("*.txt"))) or "none"
            hint = (
                " (train_aug is SBD's list: put it there, or set dataset.options.train_list to train)"
                if "aug" in name
                else ""
            )
            problems.append(f"{path} is missing; lists there: {names}{hint}")
            return []
        lines = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [Path(line).stem if line.endswith((".jpg", ".png")) else line for line in lines]

    def _tags(self, ids: list[str], problems: list[str]) -> dict[str, tuple[str, ...]]:
        if self.params.tags == "csv":
            rows = read_table(self.root / "tags.csv", ["id", "tags"])
            row_ids = [without_suffix(row["id"]) for row in rows]
            tags = dict(zip(row_ids, split_tags((row["tags"] for row in rows), VOC_CLASSES), strict=True))
            listed = set(ids)
            problems += [f"{image_id!r}: stands twice in tags.csv" for image_id in duplicates(row_ids) if image_id in listed]
            problems += [
                f"{image_id!r}: unknown tag {tag!r} in tags.csv"
                for image_id, names in tags.items()
                for tag in names
                if image_id in listed and tag not in VOC_CLASSES
            ]
            return tags
        if self.params.tags == "npy":
            table = read_cls_labels(self.root / "cls_labels.npy")
            return {
                image_id: tuple(name for name, tagged in zip(VOC_CLASSES, table[image_id], strict=True) if tagged)
                for image_id in ids
                if image_id in table
            }
        if not (self.root / "Annotations").is_dir():  # a single problem, not one per image
            hint = "set dataset.options.tags to csv or npy, or put VOC's Annotations there"
            problems.append(f"{self.root / 'Annotations'} is missing; {hint}")
            return {}
        return {image_id: names for image_id in ids if (names := self._tags_of_annotation(image_id, problems)) is not None}

    def _tags_of_annotation(self, image_id: str, problems: list[str]) -> tuple[str, ...] | None:
        path = self.root / "Annotations" / f"{image_id}.xml"
        if not path.is_file():
            problems.append(f"{image_id!r}: {path} is missing; tags come from it (dataset.options.tags)")
            return None
        try:
            names = [(element.text or "").strip() for element in ElementTree.parse(path).getroot().findall("object/name")]
        except ElementTree.ParseError as error:
            problems.append(f"{image_id!r}: {path.name} is no valid XML: {error}")
            return None
        problems += [f"{image_id!r}: unknown object {name!r} in {path.name}" for name in names if name not in VOC_CLASSES]
        return tuple(dict.fromkeys(names))


def _photograph(image_id: str) -> Path:
    return Path("JPEGImages") / f"{image_id}.jpg"


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers and refuses everything else: a pickle can run any program."""

    ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy.core.multiarray", "scalar"),
            ("numpy._core.multiarray", "scalar"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise DatasetError(
                [f"cls_labels.npy asks for {module}.{name}; only NumPy arrays are allowed. Do not trust this file"]
            )
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_cls_labels(path: Path) -> Mapping[str, np.ndarray]:
    """cls_labels.npy, a pickled dict of WSSS code → id → f32[20], 1 where the class is present.

    Integer ids (2007000032, as IRN writes them) become 2007_000032. DatasetError where the file is missing, is no such dict,
    or asks for anything but NumPy arrays.
    """
    if not path.is_file():
        raise DatasetError([f"{path} is missing; set dataset.options.tags to xml or csv, or put the file there"])
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read_header(file)
            if not dtype.hasobject or shape != ():
                raise DatasetError([f"{path} holds {dtype}{shape}, not the dict of cls_labels.npy"])
            content = _ArraysOnly(file, encoding="latin1").load()  # latin1: arrays that Python 2 has written
    except DatasetError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise DatasetError([f"{path} cannot be read: {error}"]) from error
    table = content.item() if isinstance(content, np.ndarray) and content.shape == () else content
    if not isinstance(table, dict):
        raise DatasetError([f"{path} holds a {type(table).__name__}, not a dict"])
    by_id = {_official_id(key): value for key, value in table.items()}
    misshapen = [key for key, value in by_id.items() if np.shape(value) != (len(VOC_CLASSES),)]
    if misshapen:
        raise DatasetError([f"{path}: {key!r} has no {len(VOC_CLASSES)} values" for key in misshapen])
    return by_id


def _official_id(key: Any) -> str:
    return f"{int(key) // 10**6}_{int(key) % 10**6:06d}" if isinstance(key, (int, np.integer)) else str(key)
