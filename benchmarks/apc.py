"""Adaptive-K pooling against top-k pooling, patch contrast against all pairs. Each variant runs in its own process.

`python -m benchmarks.apc VARIANT` prints seconds and MiB as JSON; benchmarks/run.py sets pairs of variants side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Memory, Timing, main_of, pair
from pipeline.methods.apc.patch_losses import patch_contrast
from pipeline.methods.apc.patch_pooling import adaptive_k_pooled

NAME = "benchmarks.apc"
IMAGES, PLANES, SIDE, DIM, K_MAX = 16, 21, 24, 768, 24  # a ViT-B's patches at 384 px, VOC's classes and background
CONTRASTED, HIGH, LOW = 4, 0.85, 0.15
REPEATS = 3  # of a single pooling, too short to time


def scores(images: int) -> Tensor:
    torch.manual_seed(0)
    return (4 * torch.randn(images, PLANES, SIDE, SIDE)).softmax(dim=1).requires_grad_()


def adaptive(patch_scores: Tensor) -> Tensor:
    return adaptive_k_pooled(patch_scores, None, rule="ratio", ratio=0.9, k_max=K_MAX)


def plain(patch_scores: Tensor) -> Tensor:
    return patch_scores.flatten(2).topk(K_MAX, dim=2).values.mean(dim=2)


def pooling(pool: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    patch_scores = scores(IMAGES)

    def run() -> None:
        for _ in range(REPEATS):
            patch_scores.grad = None
            pool(patch_scores).sum().backward()

    return run


def patches() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings f32[b,d,gh,gw], class scores f32[b,c,gh,gw] and tags f32[b,c]: two classes per image."""
    torch.manual_seed(1)
    features = torch.randn(CONTRASTED, DIM, SIDE, SIDE, requires_grad=True)
    tags = torch.zeros(CONTRASTED, PLANES - 1)
    tags[:, [3, 7]] = 1
    return features, scores(CONTRASTED).detach()[:, 1:], tags


def summed(features: Tensor, class_scores: Tensor, tags: Tensor) -> Tensor:
    return patch_contrast(features, class_scores, tags, None, high=HIGH, low=LOW)


def pairwise(features: Tensor, class_scores: Tensor, tags: Tensor) -> Tensor:
    """The definition: s of all pairs of patches, then its means over the pairs that count."""
    units = F.normalize(features.flatten(2), dim=1)
    similarity = (1 + units.transpose(1, 2) @ units) / 2
    dissimilarity = (1 - similarity) * (1 - torch.eye(similarity.shape[1]))
    present = torch.nonzero(tags)
    terms = []
    for row, class_index in present.tolist():
        values = class_scores[row, class_index].flatten()
        high, low = (values > HIGH).float(), (values < LOW).float()
        if not high.any() or not low.any():
            continue
        within = high @ dissimilarity[row] @ high / (high.sum() * (high.sum() - 1)).clamp(min=1)
        terms.append(within + high @ similarity[row] @ low / (high.sum() * low.sum()))
    return torch.stack(terms).mean()


def contrasting(contrast: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
    features, class_scores, tags = patches()

    def run() -> None:
        features.grad = None
        contrast(features, class_scores, tags).backward()

    return run


VARIANTS: dict[str, Callable[[], Callable[[], object]]] = {
    "pool-adaptive": partial(pooling, adaptive),
    "pool-topk": partial(pooling, plain),
    "contrast-summed": partial(contrasting, summed),
    "contrast-pairwise": partial(contrasting, pairwise),
}


def adaptive_k(folder: Path) -> list[Timing | Memory]:
    """With a ratio of 0 both must agree before they are timed."""
    del folder
    patch_scores = scores(2)
    torch.testing.assert_close(
        adaptive_k_pooled(patch_scores, None, rule="ratio", ratio=0.0, k_max=K_MAX), plain(patch_scores)
    )
    title = f"adaptive-K pooling, {IMAGES} × {PLANES} × {SIDE**2} patches, with gradient"
    return pair(NAME, "pool-adaptive", "pool-topk", title, IMAGES * REPEATS, "images", f"mean of the top {K_MAX}")[:1]


def contrast(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    torch.testing.assert_close(summed(*patches()), pairwise(*patches()), atol=1e-5, rtol=1e-4)
    title = f"patch contrast, {CONTRASTED} × {SIDE**2} patches, with gradient"
    return pair(NAME, "contrast-summed", "contrast-pairwise", title, CONTRASTED, "images", "matrix of all pairs")


if __name__ == "__main__":
    main_of(VARIANTS)()
