"""What the stores hold: a schema per kind of result, with the dtype and axes of each array."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Item = tuple[str, Mapping[str, np.ndarray]]


class StoreError(RuntimeError):
    """A store is damaged, incomplete or of another schema; the text names the part or the id."""


@dataclass(frozen=True)
class Field:
    """An array per image, of NumPy dtype `dtype`. Axes of the same name have the same length in all fields of an image."""

    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Schema:
    """Fields by name; readers accept this version alone."""

    name: str
    version: int
    fields: Mapping[str, Field]


# classes are class indices from 0, scores their maps in 0..1 at stride 4; agreement, 0..1, of the views that were merged,
# NaN of a single view (imaging.scoremaps.view_agreement); tag_logits of all classes; affinity of all pairs of cells of
# `grid` (rows, columns), [0,0] and grid (0, 0) where none is kept; decoded: mask values of the method's own decoder, [0,0]
# where it has none
SCORE_MAPS = Schema(
    "score_maps",
    4,
    {
        "classes": Field("<u2", ("k",)),
        "scores": Field("<f2", ("k", "gh", "gw")),
        "agreement": Field("<f2", ("k",)),
        "tag_logits": Field("<f4", ("c",)),
        "affinity": Field("<f2", ("n", "n")),
        "grid": Field("<u2", ("2",)),
        "decoded": Field("|u1", ("h", "w")),
    },
)
# label holds mask values without 255; confidence is its probability × CONFIDENCE_STEPS; disagree is 1 where two thresholds
# give different labels, else 0
REFINED = Schema(
    "refined",
    1,
    {"label": Field("|u1", ("h", "w")), "confidence": Field("|u1", ("h", "w")), "disagree": Field("|u1", ("h", "w"))},
)
PSEUDO_MASKS = Schema("pseudo_masks", 1, {"mask": Field("|u1", ("h", "w"))})
CORRECTED = "corrections.json"  # beside the parts of pseudo-masks, where there are corrected masks
PREDICTIONS = Schema("predictions", 1, {"label": Field("|u1", ("h", "w")), "confidence": Field("|u1", ("h", "w"))})
# of the segmenter, on train images. classes: indices from 0 of those that can win; probabilities: of background and of these
# classes at stride 4; label: the mask value of the likeliest at the image's size, after a CRF where there is one; confidence
# as in REFINED
RELABELLED = Schema(
    "relabelled",
    1,
    {
        "classes": Field("<u2", ("k",)),
        "probabilities": Field("<f2", ("planes", "gh", "gw")),
        "label": Field("|u1", ("h", "w")),
        "confidence": Field("|u1", ("h", "w")),
    },
)
# of a segmenter that was not trained on the image: soft-min over pixels of its probabilities of the pseudo-mask's labels,
# and the mean IoU of its mask with the pseudo-mask, both 0..1; NaN where the pseudo-mask is 255 throughout
HELD_OUT = Schema("held_out", 2, {"soft_min": Field("<f4", ("1",)), "held_out_agreement": Field("<f4", ("1",))})
# the mask of the last stage (split train: pseudo-mask, val: prediction), sampled at the nearest pixels, so small that the
# report can compare the masks of all runs on all images
SMALL_MASKS = Schema("small_masks", 1, {"mask": Field("|u1", ("h", "w"))})
# thumbnails of a selection of images for the report. kind has bit 1 for the worst, bit 2 for random ones; size is (rows,
# columns) of the thumbnail; photograph is WebP; scores (the best class's, 0..255) and confidence (of the refined mask, on
# val of the prediction, 0..255) are grey JPEGs at half that size; maps is zlib of the mask values u8[m,rows,columns] of the
# stages of stage_order.GALLERY that are `present`, truth zlib of u8[rows,columns] or empty; miou is of full-size masks, NaN
# where there is no truth
GALLERY = Schema(
    "gallery",
    2,
    {
        "kind": Field("|u1", ("1",)),
        "size": Field("<u2", ("2",)),
        "photograph": Field("|u1", ("photograph bytes",)),
        "scores": Field("|u1", ("score bytes",)),
        "confidence": Field("|u1", ("confidence bytes",)),
        "present": Field("|u1", ("stages",)),
        "maps": Field("|u1", ("map bytes",)),
        "truth": Field("|u1", ("truth bytes",)),
        "miou": Field("<f4", ("stages",)),
    },
)
# Intermediate maps of some images for the report. jpeg: the panels side by side; panels: their names in UTF-8, separated by
# commas; both empty where no maps are shown. weights: [0,0] where a method has none. description: in UTF-8 what the method
# suppresses beside its classes, empty where it suppresses nothing. beside: s classes for which the image is among the best
# matches of what is suppressed; match: the cosine; means: mean cosine over all images of that class, and over those of
# others; images: how many these are; strips: a JPEG per class, end to end, of strip_bytes
INSPECTION = Schema(
    "inspection",
    3,
    {
        "jpeg": Field("|u1", ("bytes",)),
        "panels": Field("|u1", ("characters",)),
        "weights": Field("<f4", ("layers", "heads")),
        "description": Field("|u1", ("letters",)),
        "beside": Field("<u2", ("s",)),
        "match": Field("<f4", ("s",)),
        "means": Field("<f4", ("s", "2")),
        "images": Field("<u4", ("s", "2")),
        "strips": Field("|u1", ("all_bytes",)),
        "strip_bytes": Field("<u4", ("s",)),
    },
)
TRUTH = Schema("truth", 1, {"mask": Field("|u1", ("h", "w"))})


def empty(schema: Schema) -> dict[str, np.ndarray]:
    """Arrays of an image of which every axis has length 0."""
    return {name: np.zeros((0,) * len(field.axes), field.dtype) for name, field in schema.fields.items()}
