"""Photographs and masks as arrays → resized views, input tensors, augmented square crops. Random draws are the caller's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.core.labels import IGNORE

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
PADDING = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's mean: zero once the network has normalised


def view_size(size: tuple[int, int], scale: float, stride: int, long_side: int | None = None) -> tuple[int, int]:
    """(h, w) px of a view: size * scale, each side rounded to a multiple of stride, so that no pixel is cut or padded.

    With `long_side`, larger images are first scaled down to it.
    """
    h, w = size
    if long_side is not None and max(h, w) > long_side:
        scale = scale * long_side / max(h, w)
    return max(1, round(h * scale / stride)) * stride, max(1, round(w * scale / stride)) * stride


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """u8[h,w,3] → u8[size], bicubic with antialiasing. size is (h, w) px."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def tensor_of(pixels: np.ndarray, device: str | torch.device) -> Tensor:
    """Images u8[…,h,w,3] RGB → f32[…,3,h,w] in 0..1 on `device`, the input of networks."""
    # channels stay innermost in memory, since convolutions may round otherwise in another layout; a copy, since Pillow's are
    # read-only
    return torch.tensor(pixels, device=device).movedim(-1, -3).float() / 255


def crop(
    image: np.ndarray,
    mask: np.ndarray | None,
    *,
    size: int,
    scale: float,
    flip: bool,
    jitter: np.ndarray,
    at: tuple[float, float],
    box: tuple[float, float, float, float] | None = None,
    change: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """A square training crop of image u8[h,w,3] and mask u8[h,w] (or None).

    size, scale: the short side is scaled to size * scale px, then a window of size px is cut out.
    at: relative position (vertical, horizontal) in 0..1 of that window, or of a smaller image in the crop.
    box: (left, top, right, bottom) px of the image; if given, it is stretched to the square instead.
    jitter: f[3], factors of brightness, contrast and saturation.
    change: u8[·,·,3] → the same size, applied to the pixels before jitter and flip, and not to the mask.
    Returns image f32[3,size,size] in 0..1, valid bool[size,size] and mask u8[size,size] (IGNORE on padding) or None.
    """
    h, w = image.shape[:2]
    inner, row, column = (size, size), 0, 0  # (h, w) px that the image covers in the crop, and their corner
    if box is None:
        factor = size * scale / min(h, w)
        scaled = max(1, round(h * factor)), max(1, round(w * factor))
        inner = min(size, scaled[0]), min(size, scaled[1])
        top, left = ((full - part) * place for full, part, place in zip(scaled, inner, at, strict=True))
        box = (
            left / scaled[1] * w,
            top / scaled[0] * h,
            (left + inner[1]) / scaled[1] * w,
            (top + inner[0]) / scaled[0] * h,
        )
        box = (box[0], box[1], min(box[2], w), min(box[3], h))
        row, column = (int((size - part) * place) for part, place in zip(inner, at, strict=True))
    window = (slice(row, row + inner[0]), slice(column, column + inner[1]))

    pixels = np.asarray(Image.fromarray(image).resize((inner[1], inner[0]), Image.Resampling.BILINEAR, box=box))
    if change is not None:
        pixels = change(pixels)
    canvas = np.broadcast_to(PADDING, (size, size, 3)).copy()
    canvas[window] = _jittered(pixels.astype(np.float32) / 255, jitter)
    valid = np.zeros((size, size), bool)
    valid[window] = True
    labels = None
    if mask is not None:
        labels = np.full((size, size), IGNORE, np.uint8)
        labels[window] = np.asarray(Image.fromarray(mask).resize((inner[1], inner[0]), Image.Resampling.NEAREST, box=box))
    if flip:
        canvas, valid = canvas[:, ::-1], valid[:, ::-1]
        labels = labels if labels is None else labels[:, ::-1]
    return (
        np.ascontiguousarray(canvas.transpose(2, 0, 1)),
        np.ascontiguousarray(valid),
        labels if labels is None else np.ascontiguousarray(labels),
    )


def _jittered(pixels: np.ndarray, jitter: np.ndarray) -> np.ndarray:
    brightness, contrast, saturation = (np.float32(value) for value in jitter)
    pixels = pixels * brightness
    grey = pixels @ LUMA
    pixels = (pixels - grey.mean()) * contrast + grey.mean()
    grey = (pixels @ LUMA)[..., None]
    return np.clip(grey + (pixels - grey) * saturation, 0, 1)
