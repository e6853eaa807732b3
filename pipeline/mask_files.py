"""Masks and class names → the forms in which other programs and people exchange them, and back: PNG bytes, names, label maps.

Shared by the exporters, by corrections and by `segment --images`; nothing here trains or knows a stage.
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
    """u8[h,w] mask values → PNG bytes, mode P: the pixel values are the mask values, the colours VOC's."""
    image = Image.fromarray(mask)
    image.putpalette(voc_palette().tobytes())
    return _png(image)


def colour_png(numbers: np.ndarray) -> bytes:
    """u8[h,w] → PNG bytes, mode RGB: each number in its VOC colour."""
    return _png(Image.fromarray(voc_palette()[numbers]))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(value: int) -> Colour:
    red, green, blue = voc_palette()[value].tolist()
    return red, green, blue


def hex_of(value: int) -> str:
    """The colour of a mask value as #rrggbb."""
    return "#" + "".join(f"{part:02x}" for part in colour_of(value))


def legend(labels: LabelSpace) -> dict[int, str]:
    """Mask value → name, background and ignore among them; these two are renamed where a class already has their name."""
    names = dict(enumerate(labels.names, 1))
    for value, name in ((BACKGROUND, "background"), (IGNORE, "ignore")):
        names[value] = f"{name} ({value})" if name in labels.names else name
    return dict(sorted(names.items()))


def legend_lines(labels: LabelSpace) -> str:
    """classes.txt: one line `value name` per mask value."""
    return "".join(f"{value} {name}\n" for value, name in legend(labels).items())


def plain_names(labels: LabelSpace) -> dict[int, str]:
    """legend(labels) in names that a line of labelmap.txt can hold: `:`, `#` and controls become `_`, outer spaces go.

    ValueError if two classes would then have one name.
    """
    plain = {
        value: "".join("_" if part in ":#" or not part.isprintable() else part for part in name).strip() or "_"
        for value, name in legend(labels).items()
    }
    seen: dict[str, int] = {}
    for value, name in plain.items():
        if name in seen:
            names = legend(labels)
            raise ValueError(
                f"classes {names[seen[name]]!r} and {names[value]!r} are both {name!r} in labelmap.txt; rename one"
            )
        seen[name] = value
    return plain


def label_map(labels: LabelSpace) -> str:
    """labelmap.txt of CVAT and datumaro: `name:r,g,b::`, background first."""
    rows = (f"{name}:{','.join(map(str, colour_of(value)))}::" for value, name in plain_names(labels).items())
    return "# label:color_rgb:parts:actions\n" + "\n".join(rows) + "\n"


def read_label_map(text: str, labels: LabelSpace) -> tuple[dict[Colour, int], list[str]]:
    """labelmap.txt → colour → mask value of the classes that it names, and what is wrong with its lines.

    Names are compared as plain_names writes them. A label that is no class here is passed over: only its use is a mistake.
    """
    values = {name: value for value, name in plain_names(labels).items()}
    found: dict[Colour, int] = {}
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
        if found.setdefault((red, green, blue), values[name.strip()]) != values[name.strip()]:
            problems.append(f"labelmap.txt line {number}: colour {red},{green},{blue} belongs to two classes")
    return found, problems


def values_of_colours(pixels: np.ndarray, colours: Mapping[Colour, int]) -> tuple[np.ndarray, list[Colour]]:
    """u8[h,w,3] → u8[h,w] mask values, and the colours that stand for none (their pixels are 255)."""
    packed = (pixels[..., 0].astype(np.uint32) << 16) | (pixels[..., 1].astype(np.uint32) << 8) | pixels[..., 2]
    mask = np.full(packed.shape, IGNORE, np.uint8)
    strange: list[Colour] = []
    for code in np.unique(packed).tolist():
        colour = (code >> 16, code >> 8 & 255, code & 255)
        if colour in colours:
            mask[packed == code] = colours[colour]
        else:
            strange.append(colour)
        if len(strange) > 20:  # a photograph in place of a mask has a million colours
            break
    return mask, strange


def nested_stem(image_id: str) -> str:
    """An id as a relative path without suffix: its slashes stay, each part is safe by file_stem; no part is empty, `.` or `..`.

    One to one. An id with an empty part is written as one file name.
    """
    parts = image_id.split("/")
    return file_stem(image_id) if "" in parts else "/".join(map(file_stem, parts))


def id_of(stem: str) -> str:
    """The inverse of file_stem and of nested_stem."""
    return unquote(stem, errors="strict")


def components(region: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool[h,w] → i32[h,w] numbers of its 4-connected parts from 1 on (0 outside), and i64[n] areas in px."""
    numbers, count = ndimage.label(region)  # pyright: ignore[reportGeneralTypeIssues] (its stub has one return type of two)
    return numbers, np.bincount(numbers.ravel(), minlength=count + 1)[1:]
