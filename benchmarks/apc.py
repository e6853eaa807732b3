"""Adaptive-K pooling against plain top-k pooling, patch contrast against the matrix of all pairs. Each variant runs in a process of
its own.

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
from pipeline.methods.apc.patch_pooling import adaptive_k_pooled, patch_contrast

NAME = "benchmarks.apc"
IMAGES, PLANES, SIDE, DIM, K_MAX = 16, 21, 24, 768, 24  # a ViT-B's patches at 384 px, VOC's classes and background
CONTRASTED, HIGH, LOW = 4, 0.85, 0.15
REPEATS = 3  # of a single pooling, too short to time


def scores(images: int) -> Tensor:
    torch.manual_seed(0)
    return (4 * torch.randn(images, PLANES, SIDE, SIDE)).softmax(dim=1).requires_grad_()


def adaptive(found: Tensor) -> Tensor:
    return adaptive_k_pooled(found, None, rule="ratio", ratio=0.9, k_max=K_MAX)


def plain(found: Tensor) -> Tensor:
    return found.flatten(2).topk(K_MAX, dim=2).values.mean(dim=2)


def pooling(pool: Callable[[Tensor], Tensor]) -> Callable[[], object]:
    found = scores(IMAGES)

    def run() -> None:
        for _ in range(REPEATS):
            found.grad = None
            pool(found).sum().backward()

    return run


def patches() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, class scores and tags: two classes an image."""
    torch.manual_seed(1)
    features = torch.randn(CONTRASTED, DIM, SIDE, SIDE, requires_grad=True)
    tags = torch.zeros(CONTRASTED, PLANES - 1)
    tags[:, [3, 7]] = 1
    return features, scores(CONTRASTED).detach()[:, 1:], tags


def summed(features: Tensor, found: Tensor, tags: Tensor) -> Tensor:
    return patch_contrast(features, found, tags, None, high=HIGH, low=LOW)


def pairwise(features: Tensor, found: Tensor, tags: Tensor) -> Tensor:
    """The definition: s of all pairs of patches, then its means over the pairs that count."""
    units = F.normalize(features.flatten(2), dim=1)
    alike = (1 + units.transpose(1, 2) @ units) / 2
    unlike = (1 - alike) * (1 - torch.eye(alike.shape[1]))
    present = torch.nonzero(tags)
    terms = []
    for row, column in present.tolist():
        values = found[row, column].flatten()
        sure, unsure = (values > HIGH).float(), (values < LOW).float()
        if not sure.any() or not unsure.any():
            continue
        within = sure @ unlike[row] @ sure / (sure.sum() * (sure.sum() - 1)).clamp(min=1)
        terms.append(within + sure @ alike[row] @ unsure / (sure.sum() * unsure.sum()))
    return torch.stack(terms).mean()


def contrasting(contrast: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
    features, found, tags = patches()

    def run() -> None:
        features.grad = None
        contrast(features, found, tags).backward()

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
    found = scores(2)
    torch.testing.assert_close(adaptive_k_pooled(found, None, rule="ratio", ratio=0.0, k_max=K_MAX), plain(found))
    what = f"adaptive-K pooling, {IMAGES} × {PLANES} × {SIDE**2} patches, with gradient"
    return pair(NAME, "pool-adaptive", "pool-topk", what, IMAGES * REPEATS, "images", f"mean of the top {K_MAX}")[:1]


def contrast(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    torch.testing.assert_close(summed(*patches()), pairwise(*patches()), atol=1e-5, rtol=1e-4)
    what = f"patch contrast, {CONTRASTED} × {SIDE**2} patches, with gradient"
    return pair(NAME, "contrast-summed", "contrast-pairwise", what, CONTRASTED, "images", "matrix of all pairs")


if __name__ == "__main__":
    main_of(VARIANTS)()
