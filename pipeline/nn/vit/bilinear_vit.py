"""The encoder that Segmenter and WeakTr's step 2 published weights for: timm's ViT with two differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

NORM_EPS = 1e-5  # timm's ViTs have 1e-6
PATCH = 16
WIDTHS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}  # channels, heads; all are 12 blocks deep


class BilinearVit(VisionTransformer):
    """Position embeddings are resized bilinearly, without antialiasing; LayerNorm's eps is 1e-5 (WeakTr section 2.1)."""

    def __init__(self, image_size: int, drop_path: float, *, dim: int, heads: int) -> None:
        super().__init__(
            img_size=image_size,
            patch_size=PATCH,
            embed_dim=dim,
            num_heads=heads,
            num_classes=0,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=NORM_EPS),
            dynamic_img_size=True,
        )

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches f32[b,gh,gw,dim] → tokens f32[b,1+gh*gw,dim] with the class token in front. Called by timm."""
        assert self.pos_embed is not None and self.cls_token is not None  # timm's types allow ViTs without
        b, gh, gw, dim = x.shape
        own = self.pos_embed[:, 1:].reshape(1, *self.patch_embed.grid_size, dim).permute(0, 3, 1, 2)
        resized = F.interpolate(own, (gh, gw), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(b, -1, -1), x.flatten(1, 2)], dim=1)
        return tokens + torch.cat([self.pos_embed[:, :1], resized], dim=1)


def named() -> dict[str, Callable[[int, float], BilinearVit]]:
    """Architecture name → maker from image_size px and stochastic depth."""
    return {
        f"segmenter_vit_{size}_patch16": partial(BilinearVit, dim=dim, heads=heads) for size, (dim, heads) in WIDTHS.items()
    }
