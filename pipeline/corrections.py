"""data/corrections/ → masks that a person mended, by image id: they take the place of pseudo-masks in export."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pipeline.core import records as image_files
from pipeline.core import store
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.problems import counted
from pipeline.core.records import ImageRecord, Records
from pipeline.mask_files import Colour, colour_of, id_of, legend, read_label_map, values_of_colours

# what exports of masks hold beside the masks; everything else must be one
PASSED_OVER = frozenset({"ids.csv", "classes.txt", "labelmap.txt", "labels.json", "README.txt", "README.md"})
FOLDERS_PASSED_OVER = frozenset({"ImageSets", "SegmentationObject"})
MASK_FOLDER = "SegmentationClass"  # the masks of a VOC tree and of CVAT's archive; its name is no part of an id
HINT = (
    "each file is a PNG of mask values (palette or greyscale; RGB with CVAT's labelmap.txt) at the size of the upright image, "
    "named as voc_png and cvat export it: mend or remove these files (docs/exports.md)"
)


class CorrectionsError(ValueError):
    """Corrected masks cannot be used; the text lists every offender."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        super().__init__("\n".join([f"{counted(problems)} in {folder}:", *problems, HINT]))


@dataclass(frozen=True)
class Corrections:
    """files: image id → PNG; colours: of labelmap.txt, where there is one; digest: of ids, bytes and colours. Picklable."""

    files: Mapping[str, Path]
    colours: Mapping[Colour, int] | None
    labels: LabelSpace
    digest: str

    def read(self, image_id: str) -> np.ndarray:
        """u8[h,w] mask values. ValueError tells why a file is no mask of these classes."""
        return read_mask(self.files[image_id], self.labels, self.colours)


def find(folder: Path, records: Records) -> Corrections:
    """Opens every corrected mask once. CorrectionsError lists all that are broken, unknown, doubled or of another size.

    Classes that the image's tags do not name are allowed: a person who looked at the pixels knows better. They are counted.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; make it (empty if no mask was mended)")
    problems: list[str] = []
    colours = _colours(folder, records.labels, problems)
    by_id = records.by_id()
    named = _named(folder, problems)
    files: dict[str, Path] = {}
    digests = []
    for path in _pngs(folder, problems):
        shown = path.relative_to(folder).as_posix()
        image_id = _id(shown, named, by_id)
        if image_id is None:
            problems.append(f"{shown!r}: no image has this id")
        elif by_id[image_id].split != "train":
            problems.append(f"{shown!r}: image {image_id!r} is of split val; pseudo-masks are made for train only")
        elif image_id in files:
            first = files[image_id].relative_to(folder).as_posix()
            problems.append(f"{shown!r}: {first!r} is a mask of image {image_id!r} already")
        else:
            files[image_id] = path
            problem = _problem(path, by_id[image_id], records.labels, colours)
            if problem:
                problems.append(f"{shown!r}: {problem}")
            digests.append((image_id, store.file_digest(path)))
    if problems:
        raise CorrectionsError(folder, problems)
    told = repr((sorted(digests), sorted((colours or {}).items())))
    return Corrections(files, colours, records.labels, hashlib.sha256(told.encode("utf-8")).hexdigest())


def _colours(folder: Path, labels: LabelSpace, problems: list[str]) -> dict[Colour, int] | None:
    path = folder / "labelmap.txt"
    if not path.is_file():
        return None
    try:
        found, wrong = read_label_map(path.read_text(encoding="utf-8-sig"), labels)
    except UnicodeDecodeError as error:
        found, wrong = {}, [f"labelmap.txt is not UTF-8 ({error})"]
    problems += wrong
    return found


def _named(folder: Path, problems: list[str]) -> dict[str, str]:
    """File → id by ids.csv, where it was copied along; rows of files that are not here are those nobody mended."""
    path = folder / "ids.csv"
    if not path.is_file():
        return {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return {row["file"]: row["id"] for row in csv.DictReader(file)}
    except (KeyError, UnicodeDecodeError, csv.Error):
        problems.append("ids.csv must be a UTF-8 table with the columns id and file")
        return {}


def _pngs(folder: Path, problems: list[str]) -> list[Path]:
    """Masks in order of their names; hidden files, tables and DVC's own are passed over, other files are problems."""
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file() or path.name in PASSED_OVER or inside.parts[0] in FOLDERS_PASSED_OVER:
            continue
        if path.suffix.lower() == ".png":
            found.append(path)
        elif path.suffix != ".dvc":
            problems.append(f"{inside.as_posix()!r}: no PNG; other formats change the values of masks or cannot hold them")
    return found


def _id(shown: str, named: Mapping[str, str], known: Mapping[str, ImageRecord]) -> str | None:
    """The image that a mask is of: by ids.csv, by its name as exports write it, or by its name as it stands."""
    short = shown.removeprefix(MASK_FOLDER + "/")
    for row in (shown, f"{MASK_FOLDER}/{short}"):
        if named.get(row) in known:
            return named[row]
    stem = str(PurePosixPath(short).with_suffix(""))
    try:
        candidates = (id_of(stem), stem)
    except UnicodeDecodeError:
        candidates = (stem,)
    return next((candidate for candidate in candidates if candidate in known), None)


def _problem(path: Path, record: ImageRecord, labels: LabelSpace, colours: Mapping[Colour, int] | None) -> str | None:
    try:
        mask = read_mask(path, labels, colours)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says SyntaxError of a broken PNG
        return "not a known image format" if "cannot identify" in str(error) else str(error)
    if mask.shape != record.size:
        (h, w), (high, wide) = mask.shape, record.size
        return f"{h}×{w} px (h×w), the upright image of {record.id!r} is {high}×{wide}"
    return None


def read_mask(path: Path, labels: LabelSpace, colours: Mapping[Colour, int] | None) -> np.ndarray:
    """u8[h,w] mask values of a PNG; of an RGB one by its colours. ValueError tells what is wrong with it."""
    with Image.open(path) as image:
        if image.mode in ("RGB", "RGBA") and colours is not None:
            mask, strange = values_of_colours(np.asarray(image.convert("RGB")), colours)
            if strange:
                told = "; ".join(",".join(map(str, colour)) for colour in strange[:10])
                raise ValueError(f"holds the colours {told}, which labelmap.txt gives to no class of this data set")
            return mask
        if image.mode in ("RGB", "RGBA"):
            raise ValueError("an RGB image; its colours need CVAT's labelmap.txt beside it")
        palette = image.getpalette("RGB") if image.mode == "P" else None
    mask = image_files.read_mask(path)
    values = np.unique(mask).tolist()
    strange = [value for value in values if len(labels) < value != IGNORE]
    if strange:
        raise ValueError(f"holds the values {strange[:10]}; allowed are 0..{len(labels)} and {IGNORE}")
    if palette is not None:
        _same_colours(values, palette, labels)
    return mask


def _same_colours(values: list[int], palette: list[int], labels: LabelSpace) -> None:
    """ValueError where an image editor has re-ordered the palette: a value then has the colour of another class."""
    names = legend(labels)
    owner = {colour_of(value): value for value in names}
    for value in values:
        red, green, blue = palette[3 * value : 3 * value + 3] or (value,) * 3
        of = owner.get((red, green, blue), value)
        if of != value and not red == green == blue == value:  # a palette of greys says nothing
            raise ValueError(
                f"value {value} ({names[value]}) has the colour of {of} ({names[of]}): an image editor has re-ordered the "
                "palette; save it as greyscale of mask values, or keep the palette"
            )
