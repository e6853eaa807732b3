"""SegFormer's decoder (Xie et al. 2021; AFA, section 1): feature maps → logits at the first one's resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """1×1 projection of a map, as a linear layer under the published name."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, width)

    def forward(self, maps: Tensor) -> Tensor:
        return self.proj(maps.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(maps.shape[0], -1, *maps.shape[-2:])


class SegFormerHead(nn.Module):
    """dims: channels of the maps; planes: of the logits; width: channels of the projections; dropout: rate 0..1 of whole
    channels.

    Parameters are named as in SegFormer's and AFA's checkpoints.
    """

    def __init__(self, dims: Sequence[int], planes: int, *, width: int, dropout: float) -> None:
        super().__init__()
        for stage, dim in enumerate(dims, start=1):
            self.add_module(f"linear_c{stage}", Linear(dim, width))
        self.linear_fuse = nn.ModuleDict(
            {"conv": nn.Conv2d(len(dims) * width, width, 1, bias=False), "bn": nn.BatchNorm2d(width)}
        )
        self.dropout = nn.Dropout2d(dropout)
        self.linear_pred = nn.Conv2d(width, planes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps [b,dim,·,·], finest first → logits f32[b,planes,h,w] at the finest map's size."""
        size = features[0].shape[-2:]
        projected = [
            F.interpolate(self.get_submodule(f"linear_c{stage}")(maps), size, mode="bilinear", align_corners=False)
            for stage, maps in reversed(list(enumerate(features, start=1)))
        ]
        fused = F.relu(self.linear_fuse["bn"](self.linear_fuse["conv"](torch.cat(projected, dim=1))))
        return self.linear_pred(self.dropout(fused))
