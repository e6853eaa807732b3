"""data/corrections/ → masks corrected by annotators, by image id; in export they replace pseudo-masks."""

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

# files and folders of exports that are no masks
SKIPPED_FILES = frozenset({"ids.csv", "classes.txt", "labelmap.txt", "labels.json", "README.txt", "README.md"})
SKIPPED_FOLDERS = frozenset({"ImageSets", "SegmentationObject"})
MASK_FOLDER = "SegmentationClass"  # the masks of a VOC tree and of CVAT's archive; its name is no part of an id
HINT = (
    "each file is a PNG of mask values (palette or greyscale; RGB with CVAT's labelmap.txt) at the size of the upright "
    "image, named as voc_png and cvat export it: correct or remove these files (docs/exports.md)"
)


class CorrectionsError(ValueError):
    """Corrected masks cannot be used; the text lists every problem."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        super().__init__("\n".join([f"{counted(problems)} in {folder}:", *problems, HINT]))


@dataclass(frozen=True)
class Corrections:
    """Corrected masks by image. Picklable.

    files    PNG by image id
    colours  mask values by colour, of labelmap.txt; None where there is none
    digest   sha256 of ids, files and colours
    """

    files: Mapping[str, Path]
    colours: Mapping[Colour, int] | None
    labels: LabelSpace
    digest: str

    def read(self, image_id: str) -> np.ndarray:
        """u8[h,w] mask values. ValueError says why a file is no mask of these classes."""
        return read_mask(self.files[image_id], self.labels, self.colours)


def load_corrections(folder: Path, records: Records) -> Corrections:
    """Every corrected mask of a folder, opened once.

    CorrectionsError lists all that are unreadable, of unknown ids, duplicate or of another size than the upright image;
    ValueError if there is no such folder. Classes beyond the image's tags are allowed: an annotator sees the pixels.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing; make it (empty if no mask is corrected)")
    problems: list[str] = []
    colours = _colours(folder, records.labels, problems)
    by_id = records.by_id()
    id_of_file = _ids_by_file(folder, problems)
    files: dict[str, Path] = {}
    digests = []
    for path in _pngs(folder, problems):
        name = path.relative_to(folder).as_posix()
        image_id = _image_id(name, id_of_file, by_id)
        if image_id is None:
            problems.append(f"{name!r}: no image has this id")
        elif by_id[image_id].split != "train":
            problems.append(f"{name!r}: image {image_id!r} is of split val; pseudo-masks are made for train only")
        elif image_id in files:
            first = files[image_id].relative_to(folder).as_posix()
            problems.append(f"{name!r}: {first!r} is a mask of image {image_id!r} already")
        else:
            files[image_id] = path
            problem = _problem(path, by_id[image_id], records.labels, colours)
            if problem:
                problems.append(f"{name!r}: {problem}")
            digests.append((image_id, store.file_digest(path)))
    if problems:
        raise CorrectionsError(folder, problems)
    content = repr((sorted(digests), sorted((colours or {}).items())))
    return Corrections(files, colours, records.labels, hashlib.sha256(content.encode("utf-8")).hexdigest())


def _colours(folder: Path, labels: LabelSpace, problems: list[str]) -> dict[Colour, int] | None:
    path = folder / "labelmap.txt"
    if not path.is_file():
        return None
    try:
        colours, line_problems = read_label_map(path.read_text(encoding="utf-8-sig"), labels)
    except UnicodeDecodeError as error:
        colours, line_problems = {}, [f"labelmap.txt is not UTF-8 ({error})"]
    problems += line_problems
    return colours


def _ids_by_file(folder: Path, problems: list[str]) -> dict[str, str]:
    """Image ids by file name, of ids.csv where it is present; rows of files that are not in the folder do no harm."""
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
    """PNG files by name. Hidden files, tables and `*.dvc` are skipped; any other file is a problem."""
    pngs = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or not path.is_file() or path.name in SKIPPED_FILES or inside.parts[0] in SKIPPED_FOLDERS:
            continue
        if path.suffix.lower() == ".png":
            pngs.append(path)
        elif path.suffix != ".dvc":
            problems.append(f"{inside.as_posix()!r}: no PNG; other formats change the values of masks or cannot hold them")
    return pngs


def _image_id(name: str, id_of_file: Mapping[str, str], by_id: Mapping[str, ImageRecord]) -> str | None:
    """Image id of a mask: by ids.csv, else by an export's name of the id, else the name itself; None if unknown."""
    short = name.removeprefix(MASK_FOLDER + "/")
    for file in (name, f"{MASK_FOLDER}/{short}"):
        if id_of_file.get(file) in by_id:
            return id_of_file[file]
    stem = str(PurePosixPath(short).with_suffix(""))
    try:
        candidates = (id_of(stem), stem)
    except UnicodeDecodeError:
        candidates = (stem,)
    return next((candidate for candidate in candidates if candidate in by_id), None)


def _problem(path: Path, record: ImageRecord, labels: LabelSpace, colours: Mapping[Colour, int] | None) -> str | None:
    try:
        mask = read_mask(path, labels, colours)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow says SyntaxError of a broken PNG
        return "not a known image format" if "cannot identify" in str(error) else str(error)
    if mask.shape != record.size:
        (h, w), (image_h, image_w) = mask.shape, record.size
        return f"{h}×{w} px (h×w), the upright image of {record.id!r} is {image_h}×{image_w}"
    return None


def read_mask(path: Path, labels: LabelSpace, colours: Mapping[Colour, int] | None) -> np.ndarray:
    """u8[h,w] mask values of a PNG, of an RGB one by its colours. ValueError says what is wrong with it."""
    with Image.open(path) as image:
        if image.mode in ("RGB", "RGBA") and colours is not None:
            mask, unknown = values_of_colours(np.asarray(image.convert("RGB")), colours)
            if unknown:
                text = "; ".join(",".join(map(str, colour)) for colour in unknown[:10])
                raise ValueError(f"holds the colours {text}, which labelmap.txt gives to no class of this data set")
            return mask
        if image.mode in ("RGB", "RGBA"):
            raise ValueError("an RGB image; its colours need CVAT's labelmap.txt beside it")
        palette = image.getpalette("RGB") if image.mode == "P" else None
    mask = image_files.read_mask(path)
    values = np.unique(mask).tolist()
    unknown = [value for value in values if len(labels) < value != IGNORE]
    if unknown:
        raise ValueError(f"holds the values {unknown[:10]}; allowed are 0..{len(labels)} and {IGNORE}")
    if palette is not None:
        _check_palette(values, palette, labels)
    return mask


def _check_palette(values: list[int], palette: list[int], labels: LabelSpace) -> None:
    """ValueError where a value has the colour of another class: image editors re-order palettes."""
    names = legend(labels)
    value_of_colour = {colour_of(value): value for value in names}
    for value in values:
        red, green, blue = palette[3 * value : 3 * value + 3] or (value,) * 3
        shown_value = value_of_colour.get((red, green, blue), value)
        if shown_value != value and not red == green == blue == value:  # grey palettes carry no class colours
            raise ValueError(
                f"value {value} ({names[value]}) has the colour of {shown_value} ({names[shown_value]}): an image "
                "editor has re-ordered the palette; save it as greyscale of mask values, or keep the palette"
            )
