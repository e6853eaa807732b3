"""Gradients of bicubic resizing and adaptive mean pooling as products with fixed matrices.

PyTorch's kernels for CUDA add them up in no fixed order, and refuse where deterministic ones are asked for. Both are linear
and separable, y = R x Cᵀ, so the gradient is Rᵀ g C. ViTs resize position embeddings so, smp's PSPNet and UPerNet pool so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Scale = float | None
Size = tuple[int, ...] | list[int]


def resizing_gradient(
    resize: Any,
    gradient: Tensor,
    output_size: Size,
    input_size: Size,
    align_corners: bool,
    scale_h: Scale = None,
    scale_w: Scale = None,
) -> Tensor:
    """f[b,c,h',w'] → f[b,c,h,w] for ATen's operator `resize`; the other arguments are those of its backward operator."""
    rows, columns = (
        _resizing_matrix(resize, before, after, align_corners, scale, gradient.device)
        for before, after, scale in zip(input_size[-2:], output_size, (scale_h, scale_w), strict=True)
    )
    return product(rows, gradient, columns)


def pooling_gradient(gradient: Tensor, images: Tensor) -> Tensor:
    """f[…,h',w'] → f[…,h,w] of adaptive_avg_pool2d."""
    rows, columns = (
        _pooling_matrix(before, after, gradient.device)
        for before, after in zip(images.shape[-2:], gradient.shape[-2:], strict=True)
    )
    return product(rows, gradient, columns)


def product(rows: Tensor, gradient: Tensor, columns: Tensor) -> Tensor:
    """Rᵀ g C: f32[h',h], f[…,h',w'], f32[w',w] → f[…,h,w]."""
    return (rows.T @ gradient.float() @ columns).to(gradient.dtype)


@lru_cache(maxsize=64)
def _resizing_matrix(
    resize: Any, before: int, after: int, align_corners: bool, scale: Scale, device: torch.device
) -> Tensor:
    """f32[after,before], made once: what becomes of lines that are 1 in a single cell."""
    lines = torch.eye(before, dtype=torch.float64)[:, None, None]  # not columns: those of width 1, ATen antialiases wrongly
    return resize(lines, [1, after], align_corners, None, scale)[:, 0, 0].T.float().contiguous().to(device)


@lru_cache(maxsize=64)
def _pooling_matrix(before: int, after: int, device: torch.device) -> Tensor:
    """f32[after,before], made once."""
    lines = torch.eye(before, dtype=torch.float64)[:, None, None]
    return F.adaptive_avg_pool2d(lines, (1, after))[:, 0, 0].T.float().contiguous().to(device)


KERNELS: dict[str, Callable[..., Tensor]] = {  # by ATen's names
    "upsample_bicubic2d_backward": partial(resizing_gradient, aten.upsample_bicubic2d.default),
    "_upsample_bicubic2d_aa_backward": partial(resizing_gradient, aten._upsample_bicubic2d_aa.default),
    "_adaptive_avg_pool2d_backward": pooling_gradient,
}


@lru_cache
def register(dispatch_key: str) -> torch.library.Library:
    """From now on, autograd takes KERNELS for tensors of `dispatch_key`, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators,  other operators may also be overridden")
        for name, kernel in KERNELS.items():
            library.impl(name, kernel, dispatch_key, allow_override=True)
    return library
