"""Synthetic images from shapes and textures: polygons filled with planks, scales, wool, bricks … on drawn backgrounds.

All randomness comes from a NumPy generator: the same seed gives the same image. Points of shapes are in units of the
object's radius, with the origin at its centre, x to the right and y down. Colours are f64[3] RGB in 0..255. A texture
(rng, h, w, base colour) → f[h,w,3] fills h × w px.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SUPERSAMPLING = 2
OUTLINE = 0.62  # brightness of a part's outline, relative to its base colour

Colour = np.ndarray  # f64[3]
Points = np.ndarray  # f64[n,2] (x, y)
Texture = Callable[[np.random.Generator, int, int, Colour], np.ndarray]


def colour(
    rng: np.random.Generator,
    hue: tuple[float, float] = (0, 1),
    saturation: tuple[float, float] = (0.3, 0.8),
    value: tuple[float, float] = (0.5, 0.95),
) -> Colour:
    """A colour whose hue, saturation and value (HSV) are uniform in ranges within 0..1; hue wraps around."""
    h, s, v = rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)
    return np.array(colorsys.hsv_to_rgb(h, s, v)) * 255


def ellipse(cx: float, cy: float, rx: float, ry: float, corners: int = 28) -> Points:
    """Polygon of `corners` points on an ellipse with centre (cx, cy) and radii (rx, ry)."""
    angle = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    """Corners of an axis-aligned rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def polygon(*corners: tuple[float, float]) -> Points:
    """Points of the corners (x, y), in order."""
    return np.array(corners, float)


def dome(cx: float, base: float, rx: float, height: float) -> Points:
    """Upper half of an ellipse with its centre at (cx, base)."""
    angle = np.linspace(math.pi, 2 * math.pi, 20)
    return np.stack([cx + rx * np.cos(angle), base + height * np.sin(angle)], axis=1)


def cloud(
    rng: np.random.Generator, cx: float, cy: float, rx: float, ry: float, bumps: int = 8, depth: float = 0.14
) -> Points:
    """An ellipse whose radius swells `bumps` times around, by a fraction of up to `depth`."""
    angle = np.linspace(0, 2 * math.pi, 6 * bumps, endpoint=False)
    radius = 1 + depth * np.abs(np.sin(bumps * angle / 2 + rng.uniform(0, math.pi)))
    return np.stack([cx + rx * radius * np.cos(angle), cy + ry * radius * np.sin(angle)], axis=1)


def _shaded(base: Colour, light: np.ndarray) -> np.ndarray:
    """Relative brightness f[h,w] times a colour → f[h,w,3]."""
    return light[..., None] * base


def _grid(h: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)[None, :]


def plain(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """One colour, about as bright as `base`."""
    return _shaded(base, np.ones((h, w), np.float32) + rng.uniform(-0.05, 0.05))


def planks(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Horizontal boards with dark seams."""
    y, x = _grid(h, w)
    pitch = rng.uniform(7, 11)
    board = np.floor(y / pitch)
    light = 0.9 + 0.22 * ((np.sin(board * 12.9 + rng.uniform(0, 6)) + 1) / 2) - 0.45 * (y % pitch < 2)
    return _shaded(base, light + 0.03 * np.sin(x / 3))


def fibres(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Fine vertical lines."""
    _, x = _grid(h, w)
    return _shaded(base, np.broadcast_to(0.95 + 0.16 * np.sin(x / rng.uniform(1.0, 1.6) + rng.uniform(0, 6)), (h, w)))


def scales(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Rows of round scales, each row shifted by half."""
    y, x = _grid(h, w)
    pitch = rng.uniform(9, 13)
    row = np.floor(y / (pitch * 0.6))
    dx = (x + (row % 2) * pitch / 2) % pitch - pitch / 2
    dy = y % (pitch * 0.6)
    distance = np.hypot(dx, dy) / (pitch / 2)
    return _shaded(base, np.where(distance < 0.85, 1.12 - 0.25 * distance, 0.62))


def wool(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Curls: the sine of smooth noise."""
    coarse = smooth_noise(rng, h, w, 9)
    light = 0.95 + 0.2 * np.sin(3.2 * coarse + smooth_noise(rng, h, w, 5) * 2.2)
    return _shaded(base, light)


def bricks(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Courses of bricks in light mortar."""
    y, x = _grid(h, w)
    high = rng.uniform(8, 11)
    wide = high * 2
    row = np.floor(y / high)
    along = x + (row % 2) * wide / 2
    tone = np.sin(row * 7.1 + np.floor(along / wide) * 3.7)
    mortar = (y % high < 1.8) | (along % wide < 1.8)
    return np.where(mortar[..., None], 205.0, _shaded(base, 0.92 + 0.14 * tone))


def tiles(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Overlapping roof tiles: dark lower edges."""
    y, x = _grid(h, w)
    pitch = rng.uniform(7, 9)
    row = np.floor(y / pitch)
    edge = ((y % pitch) / pitch) ** 2
    return _shaded(base, 1.08 - 0.42 * edge - 0.2 * ((x + (row % 2) * 4) % 8 < 1.5))


def metal(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Paint with a soft band of reflected sky."""
    y, _ = _grid(h, w)
    t = y / max(1, h)
    light = 0.82 + 0.5 * np.exp(-(((t - rng.uniform(0.38, 0.5)) / 0.09) ** 2)) - 0.25 * t
    gloss = np.clip(light - 1, 0, 1)[..., None] * 150
    return np.broadcast_to(_shaded(base, light) + gloss, (h, w, 3))


def spots(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Light round spots on a jittered lattice."""
    y, x = _grid(h, w)
    pitch = rng.uniform(20, 27)
    row = np.floor(y / pitch)
    dx = (x + (row % 2) * pitch / 2) % pitch - pitch / 2
    dy = y % pitch - pitch / 2
    return np.where((np.hypot(dx, dy) < pitch * 0.27)[..., None], np.array([244.0, 240.0, 228.0]), base)


def checks(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """A chessboard."""
    y, x = _grid(h, w)
    pitch = rng.uniform(8, 12)
    return _shaded(base, 0.78 + 0.4 * ((np.floor(y / pitch) + np.floor(x / pitch)) % 2))


def stripes(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Broad slanted stripes."""
    y, x = _grid(h, w)
    slant = rng.uniform(-0.8, 0.8)
    return _shaded(base, 0.72 + 0.5 * (np.sin((x + slant * y) / rng.uniform(3.5, 5)) > 0))


def cloth(rng: np.random.Generator, h: int, w: int, base: Colour) -> np.ndarray:
    """Panels of cloth with seams and a soft shade."""
    y, x = _grid(h, w)
    seam = (x % rng.uniform(14, 20)) < 1.6
    return _shaded(base, 1.04 - 0.14 * x / max(1, w) - 0.14 * seam + 0.02 * np.sin(y / 5))


TEXTURES: dict[str, Texture] = {
    "plain": plain, "planks": planks, "fibres": fibres, "scales": scales, "wool": wool, "bricks": bricks, "tiles": tiles,
    "metal": metal, "spots": spots, "checks": checks, "stripes": stripes, "cloth": cloth,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One polygon of an object, filled with a texture. Later parts cover earlier ones."""

    points: Points
    texture: Texture
    base: Colour


def smooth_noise(rng: np.random.Generator, h: int, w: int, cell: int) -> np.ndarray:
    """f32[h,w] noise of mean 0 and standard deviation about 1, correlated over `cell` px."""
    coarse = rng.standard_normal((h // cell + 3, w // cell + 3)).astype(np.float32)
    wide = Image.fromarray(coarse).resize((coarse.shape[1] * cell, coarse.shape[0] * cell), Image.Resampling.BICUBIC)
    return np.asarray(wide)[cell : cell + h, cell : cell + w]


class Canvas:
    """Image and mask of size × size px, drawn at SUPERSAMPLING times that size. ground: f32[size,size,3] in 0..255."""

    def __init__(self, size: int, ground: np.ndarray) -> None:
        self.size = size
        side = size * SUPERSAMPLING
        self.image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8)).resize(
            (side, side), Image.Resampling.BILINEAR
        )
        self.mask = Image.new("L", (side, side))

    def paint(
        self,
        rng: np.random.Generator,
        parts: Sequence[Part],
        *,
        centre: tuple[float, float],
        radius: float,
        turn: float,
        mirrored: bool,
        value: int,
    ) -> None:
        """Draws an object over the others: centre (x, y) and radius in px of the image, turn in radians, its mask value."""
        shade = rng.uniform(0.86, 1.1)
        draw, scale = ImageDraw.Draw(self.image), radius * SUPERSAMPLING
        mask = ImageDraw.Draw(self.mask)
        rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        for part in parts:
            points = part.points * (-1 if mirrored else 1, 1) @ rotation * scale + np.array(centre) * SUPERSAMPLING
            low, high = np.floor(points.min(axis=0)).astype(int), np.ceil(points.max(axis=0)).astype(int) + 1
            w, h = (int(side) for side in np.maximum(high - low, 1))
            filled = np.clip(part.texture(rng, h, w, part.base) * shade, 0, 255).astype(np.uint8)
            stencil = Image.new("L", (w, h))
            corners = [(float(x), float(y)) for x, y in points - low]
            ImageDraw.Draw(stencil).polygon(corners, fill=255)
            self.image.paste(Image.fromarray(np.ascontiguousarray(filled)), (int(low[0]), int(low[1])), stencil)
            edge = tuple(int(v) for v in np.clip(part.base * shade * OUTLINE, 0, 255))
            closed = [(float(x), float(y)) for x, y in [*points, points[0]]]
            draw.line(closed, fill=edge, width=SUPERSAMPLING, joint="curve")
            mask.polygon([(float(x), float(y)) for x, y in points], fill=value)

    def finish(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Image u8[size,size,3] RGB with a lighting gradient and noise, and its mask u8[size,size]."""
        size = self.size
        pixels = np.asarray(self.image.resize((size, size), Image.Resampling.BOX)).astype(np.float32)
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        tilt = rng.normal(size=2).astype(np.float32) * 9
        pixels += (tilt[0] * ramp[:, None] + tilt[1] * ramp[None, :])[..., None]
        pixels += smooth_noise(rng, size, size, 10)[..., None] * 4 + smooth_noise(rng, size, size, 3)[..., None] * 3
        pixels += rng.standard_normal((size, size, 3)).astype(np.float32) * 3
        mask = np.asarray(self.mask)[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
        return np.clip(pixels, 0, 255).astype(np.uint8), np.ascontiguousarray(mask)


# backgrounds: colours above and below the horizon, RGB
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "sea": ((156, 198, 230), (52, 108, 160)),
    "meadow": ((170, 208, 236), (104, 154, 74)),
    "street": ((176, 176, 186), (104, 104, 112)),
    "forest": ((84, 122, 84), (92, 84, 60)),
    "snow": ((186, 202, 222), (228, 232, 240)),
}


def ground(rng: np.random.Generator, size: int, name: str) -> np.ndarray:
    """The background `name` of GROUNDS with its typical details and unlabelled clutter: f32[size,size,3] in 0..255."""
    sky, floor = (np.array(tone, float) + rng.normal(size=3) * 12 for tone in GROUNDS[name])
    horizon = int(size * rng.uniform(0.05, 0.5))
    y = np.arange(size)[:, None, None]
    field = np.where(y < horizon, sky * (1.06 - 0.2 * y / size), floor * (0.86 + 0.25 * y / size)) * np.ones((size, size, 3))
    field += smooth_noise(rng, size, size, 18)[..., None] * 8
    field += smooth_noise(rng, size, size, 4)[..., None] * 5 * (y >= horizon)
    image = Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))
    _DETAILS[name](rng, ImageDraw.Draw(image), size, horizon, floor)
    _clutter(rng, ImageDraw.Draw(image), size, horizon, floor)
    return np.asarray(image).astype(np.float32)


def _tone(rng: np.random.Generator, base: Sequence[float] | np.ndarray, spread: float = 10) -> tuple[int, ...]:
    return tuple(int(v) for v in np.clip(np.asarray(base, float) + rng.normal() * spread, 0, 255))


def _waves(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    for _ in range(size // 5):
        x, y, length = rng.uniform(0, size), rng.uniform(horizon, size), rng.uniform(4, 11)
        draw.arc([x, y, x + length, y + length * 0.4], 200, 340, fill=_tone(rng, floor * 1.25))


def _blades(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    for _ in range(size // 2):
        x, y, length = rng.uniform(0, size), rng.uniform(horizon, size), rng.uniform(2, 6)
        draw.line([x, y, x + rng.normal() * 1.5, y - length], fill=_tone(rng, floor * rng.choice([0.72, 1.22])))


def _trunks(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    for _ in range(int(rng.integers(3, 7))):
        x, width = rng.uniform(0, size), rng.uniform(3, 8)
        draw.rectangle([x, 0, x + width, horizon + rng.uniform(0, 6)], fill=_tone(rng, (70, 55, 44)))
    _blades(rng, draw, size, horizon, floor)


def _road(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    del floor
    x = 0.0
    while x < size:  # house fronts without doors
        width = rng.uniform(12, 26)
        draw.rectangle([x, horizon * rng.uniform(0, 0.5), x + width, horizon], fill=_tone(rng, (150, 142, 140), 18))
        x += width + rng.uniform(0, 4)
    y, start = rng.uniform(horizon + 8, size), rng.uniform(-18, 0)
    for left in np.arange(start, size, 18):
        draw.rectangle([left, y, left + 9, y + 2], fill=_tone(rng, (224, 219, 190)))


def _drifts(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    for _ in range(size // 10):
        x, y, length = rng.uniform(0, size), rng.uniform(horizon, size), rng.uniform(8, 26)
        draw.arc([x, y, x + length, y + length * 0.3], 190, 350, fill=_tone(rng, floor * 0.9))


_DETAILS = {"sea": _waves, "meadow": _blades, "street": _road, "forest": _trunks, "snow": _drifts}


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, size: int, horizon: int, floor: np.ndarray) -> None:
    """Clouds, stones and bushes, which no tag names."""
    for _ in range(int(rng.integers(1, 4))):
        x, y, radius = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0.03, 0.08) * size
        base = np.array([240, 243, 247]) if y < horizon else floor * rng.choice([0.65, 1.3])
        points = cloud(rng, x, y, radius * 1.5, radius * 0.7, 6, 0.2)
        draw.polygon([(float(a), float(b)) for a, b in points], fill=_tone(rng, base, 14))
