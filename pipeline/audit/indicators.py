"""An image's mask, score maps and photograph → quality indicators that need no truth; docs/audit.md defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.core.labels import BACKGROUND, IGNORE
from pipeline.core.store import CONFIDENCE_STEPS

EDGE_SIDE = 256  # px of the long side at which mask borders are compared with the photograph's edges
STABILITY_STEP = 0.1  # that `stability` moves the threshold down and up

BadSide = Literal["low", "high", "both", "neither"]

# indicator → the side on which it speaks against a mask; in the order of the columns of audit/<run>.csv
INDICATORS: dict[str, BadSide] = {
    "empty": "high", "leak": "high", "coverage": "neither", "ignored": "high", "confidence": "low", "expected_iou": "low",
    "edges": "low", "components": "high", "fragments": "high", "holes": "high", "stage_agreement": "low",
    "separation": "low", "stability": "low", "entropy": "high", "margin": "low", "certainty": "low",
    "view_agreement": "low", "held_out": "low", "held_out_agreement": "low",
}  # fmt: skip
UNDEFINED = float("nan")


@dataclass(frozen=True)
class ImageContext:
    """What indicators of every stage of an image need besides its mask.

    tags        mask values of the tagged classes; None where nobody tagged the image
    edge_ranks  f32[h',w'] in 0..1, from `edge_ranks`
    """

    tags: tuple[int, ...] | None
    edge_ranks: np.ndarray


def edge_ranks(image: np.ndarray) -> np.ndarray:
    """Photograph u8[h,w,3] → f32[h',w'] in 0..1: for each pixel, the fraction of pixels whose edge is weaker.

    The image is scaled to a long side of at most EDGE_SIDE. Edge strength is the length of the gradient by central
    differences, of which each component is the largest of the three channels'; 0 at the frame.
    """
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


def edge_alignment(label: np.ndarray, ranks: np.ndarray) -> float:
    """Mask u8[h,w], `edge_ranks` f32[h',w'] → mean rank, 0..1, along the mask's borders; NaN without borders.

    The mask is sampled on the grid of the ranks; of the two pixels that a border runs between, the higher rank counts.
    Borders at random places have less than 0.5 in the mean, since most of a photograph is smooth.
    """
    rows = (np.arange(ranks.shape[0]) * label.shape[0] + label.shape[0] // 2) // ranks.shape[0]
    columns = (np.arange(ranks.shape[1]) * label.shape[1] + label.shape[1] // 2) // ranks.shape[1]
    small = label[rows[:, None], columns]
    down, right = small[1:] != small[:-1], small[:, 1:] != small[:, :-1]
    along = np.concatenate([np.maximum(ranks[1:], ranks[:-1])[down], np.maximum(ranks[:, 1:], ranks[:, :-1])[right]])
    return float(along.mean(dtype=np.float64)) if along.size else UNDEFINED


def mask_indicators(label: np.ndarray, confidence: np.ndarray | None, context: ImageContext) -> dict[str, float]:
    """Mask values u8[h,w] and confidence u8[h,w] (of 255) → all INDICATORS by name, in their order.

    NaN where one does not apply to the image, and for those that are not of a mask alone.
    """
    pixels = np.bincount(label.ravel(), minlength=256)
    present = [int(value) for value in np.flatnonzero(pixels) if value not in (BACKGROUND, IGNORE)]
    foreground = int(pixels[present].sum())
    values = dict.fromkeys(INDICATORS, UNDEFINED)
    values["coverage"] = foreground / label.size
    values["ignored"] = float(pixels[IGNORE]) / label.size
    if context.tags is not None:
        if context.tags:
            values["empty"] = sum(not pixels[tag] for tag in context.tags) / len(context.tags)
        untagged = int(pixels[[value for value in present if value not in context.tags]].sum())
        values["leak"] = untagged / foreground if foreground else 0.0
    classes = sorted({*present, *(context.tags or ())})
    if confidence is not None and classes:
        values["confidence"], values["expected_iou"] = _confidence_and_iou(label, confidence, pixels, [BACKGROUND, *classes])
    if classes:
        alignment = edge_alignment(label, context.edge_ranks)
        values["edges"] = 0.0 if np.isnan(alignment) else alignment
    if present:
        values["components"], values["fragments"], values["holes"] = _connectivity(label, present)
    return values


def _confidence_and_iou(
    label: np.ndarray, confidence: np.ndarray, pixels: np.ndarray, values: Sequence[int]
) -> tuple[float, float]:
    """Mean confidence of a class's pixels, and the expected IoU if confidences are the probabilities of the labels.

    Both are means over the classes `values`, background included; a class without a pixel counts 0. The expected IoU of a
    class is its expected hits over the expected union; the probability 1 - confidence of a pixel is shared evenly by the
    other classes.
    """
    hits_of = np.bincount(label.ravel(), weights=confidence.ravel(), minlength=256) / CONFIDENCE_STEPS
    misses = pixels - hits_of
    misses[IGNORE] = 0.0
    hits, size = hits_of[values], pixels[values]
    union = size + (misses.sum() - misses[values]) / max(1, len(values) - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean_confidence, expected = hits / size, hits / union
    return float(np.nan_to_num(mean_confidence).mean()), float(np.nan_to_num(expected).mean())


def _connectivity(label: np.ndarray, present: Sequence[int]) -> tuple[float, float, float]:
    """Components per class; pixels outside the largest component of their class, and pixels of holes, both as fractions of
    the foreground."""
    components = fragments = holes = foreground = 0
    boxes: Any = ndimage.find_objects(np.where(label == IGNORE, np.uint8(BACKGROUND), label))
    for value in present:
        mask = np.pad(label[boxes[value - 1]] == value, 1)
        parts, count = _components(mask)
        sizes = np.bincount(parts.ravel())[1:]
        gaps, _ = _components(~mask)
        outside = int((gaps == gaps[0, 0]).sum())
        total = int(sizes.sum())
        components, foreground = components + count, foreground + total
        fragments, holes = fragments + total - int(sizes.max()), holes + mask.size - total - outside
    return components / len(present), fragments / foreground, holes / foreground


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """bool[h,w] → connected components numbered from 1, and how many there are; pixels are connected by their sides."""
    components: Any = ndimage.label(mask)
    return components


def score_map_indicators(
    scores: np.ndarray, classes: np.ndarray, tag_logits: np.ndarray, view_agreement: np.ndarray, threshold: float
) -> dict[str, float]:
    """Score maps of one image → indicators by name; none where no class is kept.

    scores          f32[k,gh,gw] in 0..1, of the kept classes
    classes         [k] their numbers, 0-based
    tag_logits      f32[c] of all classes
    view_agreement  f32[k] in 0..1, NaN for a single view
    threshold       0..1, below which a score is background

    separation      between-class variance of the best class's score at the threshold over its variance (Otsu's criterion)
    stability       mean IoU between the masks at threshold - STABILITY_STEP and threshold + STABILITY_STEP
    entropy         of the probabilities of background and classes over the largest possible one, mean of cells
    margin          between the two highest probabilities, mean of cells
    certainty       the lowest probability that the network's tag logits give to a kept class
    view_agreement  mean over the kept classes; NaN for a single view

    A cell's probabilities are the threshold, for background, and the classes' scores, over their sum.
    """
    if not len(classes):
        return {}
    best, winner = scores.max(axis=0), scores.argmax(axis=0)
    above = best > threshold
    fraction = float(above.mean())
    variance = float(best.var(dtype=np.float64))
    gap = 0.0
    if 0 < fraction < 1:
        gap = float(best[above].mean(dtype=np.float64) - best[~above].mean(dtype=np.float64))
    probabilities = np.concatenate([np.full((1, *best.shape), threshold, np.float32), scores])
    probabilities = probabilities / np.maximum(probabilities.sum(axis=0), 1e-6)
    ordered = np.partition(probabilities, -2, axis=0)
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=0).mean(dtype=np.float64)
    low, high = (np.where(best > threshold + step, winner + 1, 0) for step in (-STABILITY_STEP, STABILITY_STEP))
    return {
        "separation": min(1.0, fraction * (1 - fraction) * gap**2 / variance) if variance > 0 else 0.0,
        "stability": mask_miou(low.astype(np.uint8), high.astype(np.uint8)),
        "entropy": float(entropy / np.log(len(probabilities))),
        "margin": float((ordered[-1] - ordered[-2]).mean(dtype=np.float64)),
        "certainty": float(1 / (1 + np.exp(-float(tag_logits[classes.astype(int)].min())))),
        "view_agreement": float(view_agreement.mean(dtype=np.float64)),
    }


def mask_miou(first: np.ndarray, second: np.ndarray) -> float:
    """Masks u8 of one shape → mean IoU between them, over the values that either has; 255 counts as a class of its own."""
    sizes = np.bincount(first.ravel(), minlength=256) + np.bincount(second.ravel(), minlength=256)
    hits = np.bincount(first[first == second], minlength=256)
    present = sizes > 0
    return float((hits[present] / (sizes - hits)[present]).mean())


def class_shares(label: np.ndarray, tags: tuple[int, ...] | None) -> tuple[tuple[int, float], ...]:
    """Mask u8[h,w] → (mask value, share of the image's pixels) of every class that is tagged or present, by mask value."""
    pixels = np.bincount(label.ravel(), minlength=256)
    classes = {int(value) for value in np.flatnonzero(pixels)} - {BACKGROUND, IGNORE} | set(tags or ())
    return tuple((value, float(pixels[value]) / label.size) for value in sorted(classes))
