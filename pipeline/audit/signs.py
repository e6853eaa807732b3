"""One image's mask, score maps and photograph → label-free signs of how good the mask is. docs/audit.md says what each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE

EDGE_SIDE = 256  # px of the long side at which mask borders are held against the photograph's edges
SURE = 255  # a confidence is stored as u8: value / 255

Bad = Literal["low", "high", "both", "neither"]

# sign → the side on which it speaks against a mask; in the order of the columns of audit/<m>.csv
SIGNS: dict[str, Bad] = {
    "empty": "high", "leak": "high", "coverage": "neither", "ignored": "high", "confidence": "low", "expected_iou": "low",
    "edges": "low", "components": "high", "fragments": "high", "holes": "high", "agreement": "low", "separation": "low",
    "stability": "low", "entropy": "high", "margin": "low", "certainty": "low",
    "views": "low", "held_out": "low", "held_out_agreement": "low",
}  # fmt: skip
NONE = float("nan")


@dataclass(frozen=True)
class Seen:
    """What is known of one image without its masks: tags as mask values, or None; ranks f32[h',w'] of its edges in 0..1."""

    tags: tuple[int, ...] | None
    ranks: np.ndarray


def edge_ranks(image: np.ndarray) -> np.ndarray:
    """u8[h,w,3] → f32[h',w'], long side at most EDGE_SIDE: the share of the image's pixels whose edge is weaker."""
    h, w = image.shape[:2]
    scale = min(1.0, EDGE_SIDE / max(h, w))
    size = max(1, round(w * scale)), max(1, round(h * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)).astype(np.int32)
    squared = np.zeros(small.shape[:2], np.int64)
    squared[1:-1] += np.abs(small[2:] - small[:-2]).max(axis=2) ** 2
    squared[:, 1:-1] += np.abs(small[:, 2:] - small[:, :-2]).max(axis=2) ** 2
    strength = np.sqrt(squared).astype(np.int64)
    below = np.concatenate([[0], np.cumsum(np.bincount(strength.ravel()))])
    return (below[strength] / strength.size).astype(np.float32)


def on_edges(label: np.ndarray, ranks: np.ndarray) -> float:
    """Mean rank, 0..1, of the photograph's edges along the borders of a mask u8[h,w]; chance is below 0.5. NaN without borders."""
    rows = (np.arange(ranks.shape[0]) * label.shape[0] + label.shape[0] // 2) // ranks.shape[0]
    columns = (np.arange(ranks.shape[1]) * label.shape[1] + label.shape[1] // 2) // ranks.shape[1]
    small = label[rows[:, None], columns]
    down, right = small[1:] != small[:-1], small[:, 1:] != small[:, :-1]
    along = np.concatenate([np.maximum(ranks[1:], ranks[:-1])[down], np.maximum(ranks[:, 1:], ranks[:, :-1])[right]])
    return float(along.mean(dtype=np.float64)) if along.size else NONE


def of_mask(label: np.ndarray, confidence: np.ndarray | None, seen: Seen) -> dict[str, float]:
    """label u8[h,w] mask values, confidence u8[h,w] (of 255) → signs by name; NaN where one does not apply."""
    pixels = np.bincount(label.ravel(), minlength=256)
    shown = [int(value) for value in np.flatnonzero(pixels) if value not in (BACKGROUND, IGNORE)]
    foreground = int(pixels[shown].sum())
    found = dict.fromkeys(SIGNS, NONE)
    found["coverage"] = foreground / label.size
    found["ignored"] = float(pixels[IGNORE]) / label.size
    if seen.tags is not None:
        if seen.tags:
            found["empty"] = sum(not pixels[tag] for tag in seen.tags) / len(seen.tags)
        strangers = int(pixels[[value for value in shown if value not in seen.tags]].sum())
        found["leak"] = strangers / foreground if foreground else 0.0
    due = sorted({*shown, *(seen.tags or ())})
    if confidence is not None and due:
        found["confidence"], found["expected_iou"] = _confidences(label, confidence, pixels, [BACKGROUND, *due])
    if due:
        aligned = on_edges(label, seen.ranks)
        found["edges"] = 0.0 if np.isnan(aligned) else aligned
    if shown:
        found["components"], found["fragments"], found["holes"] = _shapes(label, shown)
    return found


def _confidences(
    label: np.ndarray, confidence: np.ndarray, pixels: np.ndarray, values: Sequence[int]
) -> tuple[float, float]:
    """Mean confidence of each class's pixels, and the IoU to expect were all confidences true; means over `values`, where a class
    without a pixel counts 0. What a pixel's class does not hold of its probability is shared evenly by the other classes."""
    held = np.bincount(label.ravel(), weights=confidence.ravel(), minlength=256) / SURE
    lacked = pixels - held
    lacked[IGNORE] = 0.0
    hits, size = held[values], pixels[values]
    union = size + (lacked.sum() - lacked[values]) / max(1, len(values) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        own, expected = hits / size, hits / union
    return float(np.nan_to_num(own).mean()), float(np.nan_to_num(expected).mean())


def _shapes(label: np.ndarray, shown: Sequence[int]) -> tuple[float, float, float]:
    """Components per class, the share of pixels outside the largest of their class, and holes as a share of the foreground."""
    components = strays = inside = foreground = 0
    boxes: Any = ndimage.find_objects(np.where(label == IGNORE, np.uint8(BACKGROUND), label))
    for value in shown:
        mask = np.pad(label[boxes[value - 1]] == value, 1)
        parts, count = _labelled(mask)
        sizes = np.bincount(parts.ravel())[1:]
        gaps, _ = _labelled(~mask)
        outside = int((gaps == gaps[0, 0]).sum())
        total = int(sizes.sum())
        components, foreground = components + count, foreground + total
        strays, inside = strays + total - int(sizes.max()), inside + mask.size - total - outside
    return components / len(shown), strays / foreground, inside / foreground


def _labelled(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """bool[h,w] → components numbered from 1, and how many there are; pixels touch by their sides."""
    found: Any = ndimage.label(mask)
    return found


def of_maps(
    scores: np.ndarray, classes: np.ndarray, tag_logits: np.ndarray, agreed: np.ndarray, level: float
) -> dict[str, float]:
    """Score maps f32[k,gh,gw] in 0..1 of `classes` (0-based), logits f32[c], how well the views agreed on each class f32[k] (NaN
    for a single view) and the background level → signs by name.

    separation  share of the variance of the best class's score that the level explains (Otsu's criterion)
    stability   mean IoU per class of the masks at level - 0.1 and level + 0.1
    entropy     of the shares of background (the level) and classes, over its maximum, mean of cells
    margin      between the two largest shares, mean of cells
    certainty   the least probability that the network gives to one of the classes
    views       mean of what the views agreed on each class; NaN for a single view
    """
    if not len(classes):
        return {}
    best, winner = scores.max(axis=0), scores.argmax(axis=0)
    above = best > level
    share = float(above.mean())
    variance = float(best.var(dtype=np.float64))
    gap = float(best[above].mean(dtype=np.float64) - best[~above].mean(dtype=np.float64)) if 0 < share < 1 else 0.0
    shares = np.concatenate([np.full((1, *best.shape), level, np.float32), scores])
    shares = shares / np.maximum(shares.sum(axis=0), 1e-6)
    ordered = np.partition(shares, -2, axis=0)
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=0).mean(dtype=np.float64) / np.log(len(shares))
    low, high = (np.where(best > level + step, winner + 1, 0) for step in (-0.1, 0.1))
    return {
        "separation": min(1.0, share * (1 - share) * gap**2 / variance) if variance > 0 else 0.0,
        "stability": agreement(low.astype(np.uint8), high.astype(np.uint8)),
        "entropy": float(entropy),
        "margin": float((ordered[-1] - ordered[-2]).mean(dtype=np.float64)),
        "certainty": float(1 / (1 + np.exp(-float(tag_logits[classes.astype(int)].min())))),
        "views": float(agreed.mean(dtype=np.float64)),
    }


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """u8 maps of one shape → mean IoU between them, over the classes (background too) that either shows; 255 agrees with 255."""
    sizes = np.bincount(first.ravel(), minlength=256) + np.bincount(second.ravel(), minlength=256)
    both = np.bincount(first[first == second], minlength=256)
    there = sizes > 0
    return float((both[there] / (sizes - both)[there]).mean())


def shares(label: np.ndarray, tags: tuple[int, ...] | None) -> tuple[tuple[int, float], ...]:
    """u8[h,w] → (mask value, share of the image) of every class that is tagged or shown."""
    pixels = np.bincount(label.ravel(), minlength=256)
    due = {int(value) for value in np.flatnonzero(pixels)} - {BACKGROUND, IGNORE} | set(tags or ())
    return tuple((value, float(pixels[value]) / label.size) for value in sorted(due))
