"""RandAugment (Cubuk et al. 2020) and random erasing (Zhong et al. 2020), every draw from the caller's generator.

The operations and their ranges are those of the "increasing" set that WeakTr trains with (weaktr.md section 1.5): a larger
magnitude always changes the image more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5  # that a drawn operation is applied
FILL = (124, 116, 104)  # ImageNet's mean, for pixels from outside the image
ERASED_AREA = (0.02, 1 / 3)  # fraction of the image
ERASED_RATIO = (0.3, 1 / 0.3)  # height over width
TRIES = 10
MEAN = np.array([0.485, 0.456, 0.406]).reshape(3, 1, 1)
DEVIATION = np.array([0.229, 0.224, 0.225]).reshape(3, 1, 1)

Picture = Image.Image
Operation = Callable[[Picture, float, float], Picture]  # picture, strength in 0..1, sign -1 or 1


def _affine(picture: Picture, matrix: tuple[float, float, float, float, float, float]) -> Picture:
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=FILL
    )


def _rotate(picture: Picture, strength: float, sign: float) -> Picture:
    return picture.rotate(sign * 30 * strength, resample=Image.Resampling.BILINEAR, fillcolor=FILL)


def _solarize_add(picture: Picture, strength: float, sign: float) -> Picture:
    del sign
    added = int(110 * strength)
    return picture.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhanced(kind: Callable[[Picture], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, strength, sign: kind(picture).enhance(max(0.1, 1 + sign * 0.9 * strength))


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda picture, strength, sign: ImageOps.autocontrast(picture),
    "equalize": lambda picture, strength, sign: ImageOps.equalize(picture),
    "invert": lambda picture, strength, sign: ImageOps.invert(picture),
    "rotate": _rotate,
    "posterize": lambda picture, strength, sign: ImageOps.posterize(picture, max(1, 4 - int(4 * strength))),
    "solarize": lambda picture, strength, sign: ImageOps.solarize(picture, 256 - min(256, int(256 * strength))),
    "solarize_add": _solarize_add,
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": lambda picture, strength, sign: _affine(picture, (1, sign * 0.3 * strength, 0, 0, 1, 0)),
    "shear_y": lambda picture, strength, sign: _affine(picture, (1, 0, 0, sign * 0.3 * strength, 1, 0)),
    "translate_x": lambda picture, strength, sign: _affine(picture, (1, 0, sign * 0.45 * strength * picture.width, 0, 1, 0)),
    "translate_y": lambda picture, strength, sign: _affine(
        picture, (1, 0, 0, 0, 1, sign * 0.45 * strength * picture.height)
    ),
}


def rand_augment(
    image: np.ndarray, rng: np.random.Generator, *, operations: int, magnitude: float, spread: float
) -> np.ndarray:
    """u8[h,w,3] → the same after `operations` operations drawn at random, each applied with probability 0.5 at a magnitude
    (0..10) drawn from a normal distribution around `magnitude` with standard deviation `spread`."""
    picture, names = Image.fromarray(image), list(OPERATIONS)
    for index in rng.integers(0, len(names), operations):
        applied, strength, sign = rng.random() < PROBABILITY, rng.normal(magnitude, spread), rng.choice([-1.0, 1.0])
        if applied:
            picture = OPERATIONS[names[index]](
                picture, float(np.clip(strength, 0, MAX_MAGNITUDE)) / MAX_MAGNITUDE, float(sign)
            )
    return np.asarray(picture)


def erase(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """f32[3,h,w] in 0..1: fills a random box with noise of ImageNet's mean and deviation, in place; nothing if none fits in
    ten tries."""
    h, w = pixels.shape[1:]
    for _ in range(TRIES):
        area = rng.uniform(*ERASED_AREA) * h * w
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < height < h and 0 < width < w:
            top, left = int(rng.integers(0, h - height + 1)), int(rng.integers(0, w - width + 1))
            noise = MEAN + DEVIATION * rng.standard_normal((3, height, width))
            pixels[:, top : top + height, left : left + width] = np.clip(noise, 0, 1)
            return


def area_box(rng: np.random.Generator, size: tuple[int, int], area_min: float) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) px of a random crop of `size` (h, w) with `area_min`..1 of the area and sides 3:4 to 4:3
    (Szegedy et al. 2015); the largest such crop in the middle if none fits in ten tries."""
    h, w = size
    lowest, highest = 3 / 4, 4 / 3
    for _ in range(TRIES):
        area = rng.uniform(area_min, 1.0) * h * w
        ratio = math.exp(rng.uniform(math.log(lowest), math.log(highest)))
        width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if width <= w and height <= h:
            left, top = rng.uniform(0, w - width), rng.uniform(0, h - height)
            return left, top, left + width, top + height
    width, height = min(w, h * highest), min(h, w / lowest)
    return (w - width) / 2, (h - height) / 2, (w + width) / 2, (h + height) / 2
