"""ResNet38d, the wide network of PSA and SEAM (methods/baselines.md section 1): f32[b,3,h,w] → f32[b,4096,h/8,w/8].

Pre-activation blocks named as in PSA's checkpoints. The last two groups are dilated instead of strided. 105 M parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 8
DIM = 4096
BN_EPS = 1e-5
DROPOUT = {"b6": 0.3, "b7": 0.5}  # of whole channels, twice in each
# PPL's groups (methods/ppl.md section 3); bn7 belongs to the last
GROUPS = (
    ("conv1a", "b2", "b2_1", "b2_2"),
    ("b3", "b3_1", "b3_2"),
    ("b4", "b4_1", "b4_2", "b4_3", "b4_4", "b4_5"),
    ("b5", "b5_1", "b5_2"),
    ("b6",),
    ("b7",),
)
TAP_DIMS = (128, 256, 512, 1024, DIM)  # of `taps`
TAP_STRIDES = (2, 4, 8, 8, 8)


def _conv(before: int, after: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(before, after, kernel, stride, padding, dilation, bias=False)


class Block(nn.Module):
    """Two 3×3 convolutions, each behind a norm; the shortcut is the raw input where shapes agree, else a 1×1 convolution of
    the normed one."""

    def __init__(
        self, before: int, middle: int, after: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(before, BN_EPS)
        self.conv_branch2a = _conv(before, middle, 3, stride=stride, dilation=dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(middle, BN_EPS)
        self.conv_branch2b1 = _conv(middle, after, 3, dilation=dilations[1])
        self.conv_branch1 = None if (before, stride) == (after, 1) else _conv(before, after, 1, stride=stride)

    def forward(self, maps: Tensor, normed: Tensor | None = None) -> Tensor:
        """normed: `self.normed(maps)` where the caller has computed it."""
        normed = self.normed(maps) if normed is None else normed
        shortcut = maps if self.conv_branch1 is None else self.conv_branch1(normed)
        middle = F.relu(self.bn_branch2b1(self.conv_branch2a(normed)))
        return shortcut + self.conv_branch2b1(middle)

    def normed(self, maps: Tensor) -> Tensor:
        return F.relu(self.bn_branch2a(maps))


class Bottleneck(nn.Module):
    """1×1, dilated 3×3 and 1×1 convolutions, each behind a norm, the last two behind dropout of whole channels as well."""

    def __init__(self, before: int, after: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.bn_branch2a = nn.BatchNorm2d(before, BN_EPS)
        self.conv_branch2a = _conv(before, after // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(after // 4, BN_EPS)
        self.conv_branch2b1 = _conv(after // 4, after // 2, 3, dilation=dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(after // 2, BN_EPS)
        self.conv_branch2b2 = _conv(after // 2, after, 1)
        self.conv_branch1 = _conv(before, after, 1)

    def forward(self, maps: Tensor, normed: Tensor | None = None) -> Tensor:
        """normed: `self.normed(maps)` where the caller has computed it."""
        normed = self.normed(maps) if normed is None else normed
        middle = self._dropped(F.relu(self.bn_branch2b1(self.conv_branch2a(normed))))
        middle = self._dropped(F.relu(self.bn_branch2b2(self.conv_branch2b1(middle))))
        return self.conv_branch1(normed) + self.conv_branch2b2(middle)

    def normed(self, maps: Tensor) -> Tensor:
        return F.relu(self.bn_branch2a(maps))

    def _dropped(self, maps: Tensor) -> Tensor:
        return F.dropout2d(maps, self.dropout, self.training)


class ResNet38d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1a = _conv(3, 64, 3)
        for name, blocks, before, middle, after in (
            ("b2", 3, 64, 128, 128),
            ("b3", 3, 128, 256, 256),
            ("b4", 6, 256, 512, 512),
        ):
            for index in range(blocks):
                block = Block(after if index else before, middle, after, stride=1 if index else 2)
                self.add_module(f"{name}_{index}" if index else name, block)
        self.b5 = Block(512, 512, 1024, dilations=(1, 2))
        self.b5_1, self.b5_2 = (Block(1024, 512, 1024, dilations=(2, 2)) for _ in range(2))
        self.b6 = Bottleneck(1024, 2048, dilation=4, dropout=DROPOUT["b6"])
        self.b7 = Bottleneck(2048, DIM, dilation=4, dropout=DROPOUT["b7"])
        self.bn7 = nn.BatchNorm2d(DIM, BN_EPS)

    def group(self, number: int, maps: Tensor) -> Tensor:
        """Maps before group `number` (from 0) → maps after it."""
        for name in GROUPS[number]:
            maps = self.get_submodule(name)(maps)
        return F.relu(self.bn7(maps)) if number + 1 == len(GROUPS) else maps

    def members(self, numbers: Sequence[int]) -> list[nn.Module]:
        """The modules of the groups `numbers` (from 0), in order."""
        names = [name for number in numbers for name in GROUPS[number]]
        return [self.get_submodule(name) for name in names] + ([self.bn7] if len(GROUPS) - 1 in numbers else [])

    def taps(self, images: Tensor) -> list[Tensor]:
        """Maps after the first norm and ReLU of b3, b4, b5 and b6 (the latter two are PSA's conv4 and conv5), then the last
        map."""
        features, maps = [], self.group(0, images)
        for number in range(1, len(GROUPS) - 1):
            first, *others = self.members([number])
            normed = first.normed(maps)  # pyright: ignore[reportCallIssue] # a Block or a Bottleneck
            features.append(normed)
            maps = first(maps, normed)
            for block in others:
                maps = block(maps)
        return [*features, self.group(len(GROUPS) - 1, maps)]

    def forward(self, images: Tensor) -> Tensor:
        for number in range(len(GROUPS)):
            images = self.group(number, images)
        return images
