"""Gradients of resizing and pooling by matrices are PyTorch's own, and autograd takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.training import resizing_gradients

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "class tokens' positions": partial(F.interpolate, scale_factor=[20.1 / 14, 7.1 / 9], mode="bicubic"),
    "timm's positions": partial(F.interpolate, size=(20, 7), mode="bicubic", antialias=True),
    "aligned corners": partial(F.interpolate, size=(20, 7), mode="bicubic", align_corners=True),
    "pooling": partial(F.adaptive_avg_pool2d, output_size=(6, 4)),
}


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 14, 9, generator=generator).requires_grad_()
    values = function(images)
    return torch.autograd.grad(values, images, torch.rand(values.shape, generator=generator))[0]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autograd_takes_the_product_where_it_is_registered_and_finds_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, products, product = gradient(FUNCTIONS[name]), [], resizing_gradients.product
    monkeypatch.setattr(resizing_gradients, "product", lambda *tensors: products.append(product(*tensors)) or products[-1])
    library = resizing_gradients.register("CPU")  # as a training on a GPU registers them for CUDA
    try:
        torch.testing.assert_close(gradient(FUNCTIONS[name]), expected, rtol=0, atol=3e-6)
        assert len(products) == 1
    finally:
        resizing_gradients.register.cache_clear()
        library._destroy()
    assert torch.equal(gradient(FUNCTIONS[name]), expected)
    assert len(products) == 1
