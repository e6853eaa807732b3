"""Patch features + one learned token per class → mask logits on the patch grid (Segmenter; WeakTr section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from timm.models.vision_transformer import Block  # noqa: E402


class MaskTransformer(nn.Module):
    """f32[b,dim,gh,gw] → logits f32[b,planes,gh,gw]: cosine of each patch with each class token, then a norm over classes.

    Names of parameters are those of Segmenter's checkpoints.
    """

    def __init__(self, planes: int, dim: int, *, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, planes, dim))
        self.blocks = nn.ModuleList(
            Block(dim, heads, qkv_bias=True, attn_drop=dropout, proj_drop=dropout, norm_layer=nn.LayerNorm)
            for _ in range(blocks)
        )
        self.decoder_norm, self.mask_norm = nn.LayerNorm(dim), nn.LayerNorm(planes)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        return self.after_blocks(features, [len(self.blocks) - 1])[0]

    def after_blocks(self, features: Tensor, which: Sequence[int]) -> list[Tensor]:
        """The logits that each of some blocks, numbered from 0, would end with: the norms and projections are shared."""
        b, _, gh, gw = features.shape
        tokens = torch.cat([self.proj_dec(features.flatten(2).transpose(1, 2)), self.cls_emb.expand(b, -1, -1)], dim=1)
        found = []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in which:
                found.append(self._masks(tokens, gh, gw))
        return found

    def _masks(self, tokens: Tensor, gh: int, gw: int) -> Tensor:
        tokens = self.decoder_norm(tokens)
        patches, classes = tokens[:, : gh * gw] @ self.proj_patch, tokens[:, gh * gw :] @ self.proj_classes
        masks = F.normalize(patches, dim=-1) @ F.normalize(classes, dim=-1).transpose(1, 2)
        return self.mask_norm(masks).transpose(1, 2).reshape(tokens.shape[0], -1, gh, gw)
