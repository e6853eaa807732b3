"""The demo's ResNet: timm's class with basic blocks and few channels, stride 8, 1.0 M parameters."""

from __future__ import annotations

from typing import Any

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from timm.models.resnet import BasicBlock, ResNet  # noqa: E402
from torch import nn  # noqa: E402

STRIDE = 8
CHANNELS = (32, 64, 96, 128)
LAYERS = (2, 2, 2, 2)
STEM_WIDTH = 16  # three 3×3 convolutions in place of the 7×7 one: the demo's classes differ by texture


def scenes_resnet(drop_path: float) -> ResNet:
    """Random weights; data/weights/pretrain.py trained those that ship. Maps at strides 4, 4, 8, 8, 8.

    timm dilates the stages that keep their resolution. Here they are not: the last map's field of view covers an image of
    128 px without, and in PPL's patches of 8 × 8 cells dilated kernels would read mostly padding.
    """
    block: Any = BasicBlock  # timm annotates the class as an instance
    net = ResNet(
        block,
        LAYERS,
        num_classes=0,
        output_stride=STRIDE,
        channels=CHANNELS,
        stem_type="deep",
        stem_width=STEM_WIDTH,
        drop_path_rate=drop_path,
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.dilation != (1, 1):
            module.dilation, module.padding = (1, 1), (1, 1)
    return net
