"""A ResNet's feature maps → class logits: DeepLab-v2's sum of dilated convolutions, and DeepLab-v3+'s pyramid and decoder.

Norms are group norms, whose statistics are of one image: the output does not depend on how a batch is cut into shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 8  # of every norm; widths are multiples of it
LOW = 1  # index of the feature map at stride 4 that v3+ reads


class DeepLabV2(nn.Module):
    """The sum of 3×3 convolutions to the classes, one per dilation (Chen et al. 2017, ASPP)."""

    def __init__(self, dims: Sequence[int], classes: int, *, dilations: Sequence[int]) -> None:
        super().__init__()
        self.aspp = nn.ModuleList(nn.Conv2d(dims[-1], classes, 3, padding=rate, dilation=rate) for rate in dilations)
        for branch in self.aspp.children():
            nn.init.normal_(branch.get_parameter("weight"), std=0.01)
            nn.init.zeros_(branch.get_parameter("bias"))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """The last map f32[b,d,gh,gw] → f32[b,classes,gh,gw]."""
        return torch.stack([branch(maps[-1]) for branch in self.aspp]).sum(dim=0)


class DeepLabV3Plus(nn.Module):
    """A pyramid of a 1×1 convolution, dilated 3×3 convolutions and the map's mean, decoded with a map at stride 4 (Chen et
    al. 2018)."""

    def __init__(
        self, dims: Sequence[int], classes: int, *, dilations: Sequence[int], width: int, low_width: int, dropout: float
    ) -> None:
        super().__init__()
        self.aspp = nn.ModuleList([_layer(dims[-1], width, 1), *(_layer(dims[-1], width, 3, rate) for rate in dilations)])
        self.mean = _layer(dims[-1], width, 1)
        self.fuse = _layer(width * (len(self.aspp) + 1), width, 1)
        self.low = _layer(dims[LOW], low_width, 1)
        self.decode = nn.Sequential(_layer(width + low_width, width, 3), _layer(width, width, 3), nn.Dropout2d(dropout))
        self.predict = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of all depths, finest first → f32[b,classes,h/4,w/4]."""
        last, low = maps[-1], self.low(maps[LOW])
        mean = self.mean(last.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *last.shape[-2:])
        deep = self.fuse(torch.cat([*(branch(last) for branch in self.aspp), mean], dim=1))
        deep = F.interpolate(deep, low.shape[-2:], mode="bilinear", align_corners=False)
        return self.predict(self.decode(torch.cat([deep, low], dim=1)))


def _layer(before: int, after: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(before, after, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, after), nn.ReLU())
