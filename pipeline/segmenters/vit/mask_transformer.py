"""Patch features + one learned token per class → mask logits on the patch grid (Segmenter; WeakTr section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n, dim = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.proj(mixed.transpose(1, 2).reshape(b, n, dim)), self.dropout, self.training)


class Mlp(nn.Module):
    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), dropout

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.fc1(tokens)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, heads, dropout), Mlp(dim, dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class MaskTransformer(nn.Module):
    """f32[b,dim,gh,gw] → logits f32[b,planes,gh,gw]: cosine of each patch with each class token, then a norm over classes.

    Names of parameters are those of Segmenter's checkpoints.
    """

    def __init__(self, planes: int, dim: int, *, blocks: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, planes, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(blocks))
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
        return self.mask_norm(masks).transpose(1, 2).reshape(len(tokens), -1, gh, gw)
