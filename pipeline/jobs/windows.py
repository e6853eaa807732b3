"""How an image is cut for a segmenter: sizes of views, corners of windows. Shared by stage segment and by ONNX models."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.core.sections import Segment

WINDOWS_PER_BATCH = 4
# Floats in one stack of planes, 512 MiB. A view or result that would need more is computed on a smaller canvas, and its
# planes are enlarged one by one: with 20 classes this begins at 6.4 megapixels, with 80 at 1.7 (640 × 480 at scale 1.75
# still fits). At most three stacks are alive, so memory is bounded whatever the photographs.
MOST_VALUES = 2**27
View = tuple[np.ndarray, tuple[bool, ...]]  # pixels u8[h,w,3]; seen as they are (False), mirrored (True), or both


def bounded(size: tuple[int, int], planes_count: int) -> tuple[int, int]:
    """size (h, w) px, or the largest of the same shape whose stack of planes has at most MOST_VALUES values."""
    h, w = size
    factor = min(1.0, math.sqrt(MOST_VALUES / (planes_count * h * w)))
    return max(1, int(h * factor)), max(1, int(w * factor))


def resize(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """u8[h,w,3] → u8[size], bilinear with antialiasing as training crops are. size is (h, w) px."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def views(image: np.ndarray, settings: Segment, planes_count: int) -> Iterator[View]:
    """The image u8[h,w,3] at each scale, and whether it is to be seen as it is (False), mirrored (True), or both."""
    h, w = image.shape[:2]
    base = 1.0 if settings.short_side is None else settings.short_side / min(h, w)
    for scale in settings.scales:
        size = bounded((max(1, round(h * base * scale)), max(1, round(w * base * scale))), planes_count)
        yield resize(image, size), (False, True) if settings.flip else (False,)


def view_count(settings: Segment) -> int:
    return len(settings.scales) * (2 if settings.flip else 1)


def batches(size: tuple[int, int], settings: Segment) -> Iterator[list[tuple[slice, slice]]]:
    """The windows of a view of (h, w) px as rows and columns, a batch at a time; all have one size.

    A view smaller than a window is not enlarged: it is one window of its own size.
    """
    h, w = size
    high, wide = min(settings.window, h), min(settings.window, w)
    corners = [
        (slice(top, top + high), slice(left, left + wide))
        for top in starts(h, high, settings.window_stride)
        for left in starts(w, wide, settings.window_stride)
    ]
    for at in range(0, len(corners), WINDOWS_PER_BATCH):
        yield corners[at : at + WINDOWS_PER_BATCH]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along one side: every stride px, the last one aligned to the border. stride ≤ window ≤ length."""
    return sorted({*range(0, length - window + 1, stride), length - window})
