"""Panels of one image → a strip of pictures side by side, as JPEG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.imaging import palette

GAP = 4  # px between panels
MAX_ASPECT = 4  # a panel's width over its height
QUALITY = 85
GREY_WEIGHT, HEAT_WEIGHT = 0.45, 0.75  # of the photograph in grey and of the scores' colours


def over(photograph: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Photograph u8[h,w,3] and scores f32[h,w] in 0..1 → the scores in colour over the photograph in grey, u8[h,w,3]."""
    grey = np.repeat(photograph.mean(axis=2, keepdims=True), 3, axis=2)
    return np.clip(GREY_WEIGHT * grey + HEAT_WEIGHT * palette.heat(scores), 0, 255).astype(np.uint8)


def strip(panels: Sequence[np.ndarray], height: int, *, smooth: int) -> bytes:
    """Panels u8[h,w,3] of equal size → JPEG, each panel scaled to `height` px; the first `smooth` are resampled bilinearly,
    the others, which show classes, to the nearest pixel."""
    h, w = panels[0].shape[:2]
    width = max(1, min(MAX_ASPECT * height, round(w * height / h)))
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), (128, 128, 128))
    for index, panel in enumerate(panels):
        resample = Image.Resampling.BILINEAR if index < smooth else Image.Resampling.NEAREST
        sheet.paste(
            Image.fromarray(np.ascontiguousarray(panel)).resize((width, height), resample), (index * (width + GAP), 0)
        )
    out = io.BytesIO()
    sheet.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
