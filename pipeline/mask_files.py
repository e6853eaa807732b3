"""Masks and class names ↔ the forms that annotation tools exchange: PNG files, brush regions, colours, label maps, names.

Shared by the exporters, corrections, segment_folder and serve.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import file_stem
from pipeline.imaging.palette import voc_palette

Colour = tuple[int, int, int]

WORD = 8  # bits of a value in rle-pack
LENGTHS = np.array([3, 4, 8, 16])  # bits in which a run's length can be stored
CHANNELS = 4
LONGEST = 2**16  # values in one run


def palette_png(mask: np.ndarray) -> bytes:
    """u8[h,w] mask values → bytes of a PNG of mode P: pixel values are mask values, the palette is VOC's."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    return _png(image)


def colour_png(values: np.ndarray) -> bytes:
    """u8[h,w] values → bytes of a PNG of mode RGB: every value in its colour of VOC's palette."""
    return _png(Image.fromarray(voc_palette()[values]))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(value: int) -> Colour:
    """(red, green, blue) of a value in VOC's palette."""
    red, green, blue = voc_palette()[value].tolist()
    return red, green, blue


def hex_of(value: int) -> str:
    """The colour of a mask value in VOC's palette, as #rrggbb."""
    return "#" + "".join(f"{part:02x}" for part in colour_of(value))


def legend(labels: LabelSpace) -> dict[int, str]:
    """Mask value → name, ascending, with background and ignore; these become `ignore (255)` where a class has the name."""
    names = dict(enumerate(labels.names, 1))
    for value, name in ((BACKGROUND, "background"), (IGNORE, "ignore")):
        names[value] = f"{name} ({value})" if name in labels.names else name
    return dict(sorted(names.items()))


def legend_lines(labels: LabelSpace) -> str:
    """classes.txt: one line `value name` per mask value."""
    return "".join(f"{value} {name}\n" for value, name in legend(labels).items())


def plain_names(labels: LabelSpace) -> dict[int, str]:
    """legend(labels) with names that labelmap.txt can hold: `:`, `#` and control characters become `_`, outer spaces go.

    ValueError if two classes then have the same name.
    """
    plain = {
        value: "".join("_" if character in ":#" or not character.isprintable() else character for character in name).strip()
        or "_"
        for value, name in legend(labels).items()
    }
    value_of: dict[str, int] = {}
    for value, name in plain.items():
        if name in value_of:
            names = legend(labels)
            raise ValueError(
                f"classes {names[value_of[name]]!r} and {names[value]!r} are both {name!r} in labelmap.txt; rename one"
            )
        value_of[name] = value
    return plain


def label_map(labels: LabelSpace) -> str:
    """Text of labelmap.txt as CVAT and Datumaro read it: a line `name:r,g,b::` per mask value, background first."""
    rows = (f"{name}:{','.join(map(str, colour_of(value)))}::" for value, name in plain_names(labels).items())
    return "# label:color_rgb:parts:actions\n" + "\n".join(rows) + "\n"


def read_label_map(text: str, labels: LabelSpace) -> tuple[dict[Colour, int], list[str]]:
    """Text of labelmap.txt → mask values by colour, and a text per line that is wrong.

    Names are compared as plain_names writes them. Labels that are no class are skipped: only their use is an error.
    """
    values = {name: value for value, name in plain_names(labels).items()}
    value_of_colour: dict[Colour, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, rest = line.partition(":")
        parts = rest.split(":")[0].split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) < 256 for part in parts):
            problems.append(f"labelmap.txt line {number}: {line!r} is not `name:red,green,blue::`")
            continue
        red, green, blue = map(int, parts)
        if name.strip() not in values:
            continue
        if value_of_colour.setdefault((red, green, blue), values[name.strip()]) != values[name.strip()]:
            problems.append(f"labelmap.txt line {number}: colour {red},{green},{blue} belongs to two classes")
    return value_of_colour, problems


def values_of_colours(pixels: np.ndarray, colours: Mapping[Colour, int]) -> tuple[np.ndarray, list[Colour]]:
    """u8[h,w,3] RGB → u8[h,w] mask values, and the colours that have none, up to 21 of them; their pixels are IGNORE."""
    packed = (pixels[..., 0].astype(np.uint32) << 16) | (pixels[..., 1].astype(np.uint32) << 8) | pixels[..., 2]
    mask = np.full(packed.shape, IGNORE, np.uint8)
    unknown: list[Colour] = []
    for code in np.unique(packed).tolist():
        colour = (code >> 16, code >> 8 & 255, code & 255)
        if colour in colours:
            mask[packed == code] = colours[colour]
        else:
            unknown.append(colour)
        if len(unknown) > 20:  # a photograph in place of a mask has a million colours
            break
    return mask, unknown


def nested_stem(image_id: str) -> str:
    """An id as a relative path without suffix: slashes stay, file_stem makes the parts safe; no part is empty, `.` or `..`.

    Injective. An id with an empty part becomes a single file name.
    """
    parts = image_id.split("/")
    return file_stem(image_id) if "" in parts else "/".join(map(file_stem, parts))


def id_of(stem: str) -> str:
    """The inverse of file_stem and of nested_stem."""
    return unquote(stem, errors="strict")


def components(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool[h,w] → i32[h,w] numbers of its 4-connected components, from 1 (0 outside), and their areas i64[n] in px."""
    numbers, count = ndimage.label(region)  # pyright: ignore[reportGeneralTypeIssues] (its stub has one return type of two)
    return numbers, np.bincount(numbers.ravel(), minlength=count + 1)[1:]


@dataclass(frozen=True)
class BrushTag:
    """A <BrushLabels> of Label Studio's labelling interface.

    name     its `name`
    to_name  the <Image> that it paints on
    labels   mask value → label; values that are not here are not painted
    """

    name: str
    to_name: str
    labels: Mapping[int, str]


def brush_regions(mask: np.ndarray, tag: BrushTag, name: str) -> list[dict[str, Any]]:
    """u8[h,w] mask values → regions of a prediction of Label Studio, one per present value that `tag` labels, never of 0.

    name: their ids are <name>-<value>; unique within a task.
    """
    h, w = mask.shape
    return [
        {
            "id": f"{name}-{value}",
            "type": "brushlabels",
            "from_name": tag.name,
            "to_name": tag.to_name,
            "original_width": w,
            "original_height": h,
            "image_rotation": 0,
            "value": {"format": "rle", "rle": list(brush_rle(mask == value)), "brushlabels": [tag.labels[value]]},
        }
        for value in np.unique(mask).tolist()
        if value != BACKGROUND and value in tag.labels
    ]


def brush_rle(region: np.ndarray) -> bytes:
    """bool[h,w] → the RLE of Label Studio's brush: rle-pack of the region's RGBA bytes, 4 per pixel, all 0 or all 255.

    rle-pack is thi.ng's (https://github.com/thi-ng/umbrella), a bit stream. Header: number of values (32 bits), bits per
    value - 1 (5 bits), then the four entries of LENGTHS - 1 (4 bits each). Per run: a 1, the index of its length's width in
    LENGTHS (2 bits), length - 1, value. Runs of literal values (a 0) are never shorter here: a pixel is 4 equal values.
    """
    flat = region.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size)) * CHANNELS
    pieces = -(-lengths // LONGEST)
    values = np.repeat(flat[starts], pieces)
    runs = np.full(pieces.sum(), LONGEST)
    ends = np.cumsum(pieces) - 1
    runs[ends] = lengths - (pieces - 1) * LONGEST
    widths = np.searchsorted(2**LENGTHS, runs)  # index in LENGTHS
    codes = ((((1 << 2) | widths) << LENGTHS[widths]) | (runs - 1)) << WORD | np.where(values, 2**WORD - 1, 0)
    header = _bits(np.array([flat.size * CHANNELS, WORD - 1, *(LENGTHS - 1)]), np.array([32, 5, 4, 4, 4, 4]))
    return np.packbits(np.concatenate([header, _bits(codes, 3 + LENGTHS[widths] + WORD)])).tobytes()


def _bits(numbers: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Numbers i64[n] and widths i64[n] in bits → u8[sum of widths], the concatenated bits, most significant first."""
    widest = int(widths.max())
    places = np.arange(widest - 1, -1, -1)
    bits = (numbers[:, None] >> places) & 1
    return bits[places < widths[:, None]].astype(np.uint8)
