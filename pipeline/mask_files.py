"""Masks and class names ↔ the forms that annotation tools exchange: PNG files, colours, label maps, file names of ids.

Shared by the exporters, corrections and segment_folder.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from urllib.parse import unquote

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import file_stem
from pipeline.imaging.palette import voc_palette

Colour = tuple[int, int, int]


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
