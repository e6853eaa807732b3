"""Patch scores, embeddings and tags → APC's losses and the target of its equivariance loss (docs/methods/apc.md).

Shape letters: b images, c classes, d channels of an embedding, gh gw cells, n = gh * gw, k the most tags that an image has.
Plane 0 of c+1 is background.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-12  # of a probability whose logarithm is taken, and of a maximum that is divided by
BackgroundTag = Literal["always", "none"]


def classification_loss(probabilities: Tensor, tags: Tensor, *, background_tag: BackgroundTag) -> Tensor:
    """ViT-PCM's MCE: probabilities f32[b,c+1] in 0..1, tags f32[b,c] 0 or 1 → mean binary cross-entropy over images and
    channels.

    background_tag: always counts background as a tag of every image; none leaves its channel out. By hand, because torch's
    refuses probabilities under autocast.
    """
    target = F.pad(tags, (1, 0), value=1.0)
    if background_tag == "none":
        probabilities, target = probabilities[:, 1:], tags
    positive, negative = (value.clamp(min=SMALLEST).log() for value in (probabilities, 1 - probabilities))
    return -(target * positive + (1 - target) * negative).mean()


def patch_contrast(
    features: Tensor, scores: Tensor, tags: Tensor, valid: Tensor | None, *, high: float, low: float, most: int | None = None
) -> Tensor:
    """Embeddings f32[b,d,gh,gw], class scores f32[b,c,gh,gw], tags f32[b,c] 0 or 1, valid bool[b,gh,gw] → a scalar in 0..2.

    For each image and each class of its tags, with H the patches that score above high, L those below low, and
    s = (1 + cos) / 2 of two embeddings: mean of 1 - s over the pairs within H plus mean of s over the pairs of H and L.
    Classes whose H or L is empty do not count; without any that counts the loss is 0. One patch in H makes no pair: its
    first mean is 0.

    most: tags of the image that has the most, if the caller knows it; else the host waits for the device. O(n * d) for each
    class: a sum of cosines over pairs is a product of sums of unit vectors,
    Σ_(i≠j in H) cos = |Σ_H u|² - Σ_H |u|² and Σ_(i in H, j in L) cos = Σ_H u · Σ_L u.
    """
    most = int(tags.sum(dim=1).max()) if most is None else most
    present, classes = tags.topk(most, dim=1)  # [b,k]: the classes of each image come first
    vectors = features.flatten(2).float()
    squares = vectors.square().sum(dim=1, keepdim=True)  # [b,1,n]
    nonzero = squares.detach() > 0  # the unit vector of a patch of zeros is taken as 0: its cosine with any other is 0
    class_scores = scores.detach().flatten(2)
    class_scores = class_scores.gather(1, classes[..., None].expand(-1, -1, class_scores.shape[2]))
    counted = present[..., None] > 0
    if valid is not None:
        counted = counted & valid.flatten(1)[:, None]
    members = torch.cat([(class_scores > high) & counted, (class_scores < low) & counted], dim=1).to(
        vectors.dtype
    )  # [b,2k,n]
    weights = members * nonzero * squares.masked_fill(~nonzero, 1).rsqrt()  # unit vectors of all patches are never made
    high_sum, low_sum = (vectors @ weights.transpose(1, 2)).float().chunk(2, dim=2)  # Σ_H u and Σ_L u, [b,d,k] each
    high_count, low_count = members.sum(dim=2).chunk(2, dim=1)
    own = (members[:, :most] * nonzero).sum(dim=2)  # Σ_H |u|²
    pairs = high_count * (high_count - 1)
    within = (high_sum.square().sum(dim=1) - own) / pairs.clamp(min=1)
    across = (high_sum * low_sum).sum(dim=1) / (high_count * low_count).clamp(min=1)
    usable = (high_count > 0) & (low_count > 0)
    terms = (pairs > 0) * (1 - within) / 2 + (1 + across) / 2
    return (terms * usable).sum() / usable.sum().clamp(min=1)


def merged_with_tags(scores: Tensor, tags: Tensor) -> Tensor:
    """Scores f32[b,c+1,gh,gw], tags f32[b,c] → the same over background and tagged classes alone, each over its maximum; a
    cell sums to 1, or to 0 where nothing scores (ViT-PCM's merge_class_labels)."""
    tagged = scores * F.pad(tags, (1, 0), value=1.0)[..., None, None]
    relative = tagged / tagged.amax(dim=(2, 3), keepdim=True).clamp(min=SMALLEST)
    return relative / relative.sum(dim=1, keepdim=True).clamp(min=SMALLEST)


def equivariance_loss(logits: Tensor, scores: Tensor, tags: Tensor) -> Tensor:
    """Logits f32[b,c+1,gh,gw] of a mirrored, resized view → mean cross-entropy with the first view's scores, over the cells
    that are not padding.

    scores: f32[b,c+1,·,·] of the first view, without gradient, 0 on padding; they are resized, mirrored and merged with the
    tags.
    """
    mirrored = F.interpolate(scores, logits.shape[-2:], mode="bilinear", align_corners=False).flip(-1)
    target = merged_with_tags(mirrored, tags)
    counted = target.sum(dim=1) > 0
    return -(target * logits.log_softmax(dim=1)).sum() / counted.sum().clamp(min=1)
