"""Class numbers and scores → colours."""

from __future__ import annotations

import numpy as np


def voc_palette() -> np.ndarray:
    """u8[256,3]: VOC's colours, which spread the bits of the class number over R, G and B."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((numbers >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def heat(scores: np.ndarray) -> np.ndarray:
    """f32[h,w] in 0..1 → u8[h,w,3] from black over red and yellow to white."""
    ramp = np.clip(scores[..., None] * 3 - np.array([0.0, 1.0, 2.0]), 0, 1)
    return (ramp * 255).astype(np.uint8)
