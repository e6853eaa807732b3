"""The demo's backbone: a small ViT behind a convolutional stem, stride 8, 0.8 M parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

STRIDE = 8
DIM = 128
DEPTH = 4
HEADS = 4


class ConvStem(nn.Module):
    """f32[b,3,h,w] → f32[b,h/8,w/8,dim]: three 3×3 convolutions of stride 2. A stem of convolutions lets a small ViT see
    texture from the first layer on (measured for `scenes`: without it, small ViTs do not localise).

    Fills the place of timm's PatchEmbed, of which VisionTransformer asks the names below.
    """

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **unused: Any) -> None:
        super().__init__()
        del unused
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        widths = (in_chans, 32, 64, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.GroupNorm(8, after), nn.GELU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(widths[-1], embed_dim, 1))

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> Any:
        return self.patch_size[0] if as_scalar else self.patch_size

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).permute(0, 2, 3, 1)


def scenes_vit(image_size: int, drop_path: float) -> VisionTransformer:
    """Random weights; data/weights/pretrain.py made those that ship. image_size: px, multiple of 8."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=STRIDE,
        embed_dim=DIM,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=3,
        num_classes=0,
        embed_layer=ConvStem,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
    )
