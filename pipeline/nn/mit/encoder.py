"""Mix Transformer, SegFormer's encoder (Xie et al. 2021): images → four feature maps, queries and keys of the last stage.

Parameters are named as in SegFormer's and AFA's checkpoints. As in AFA (section 1), the last stage keeps its resolution.
Shape letters: b images, n tokens of a stage's grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from timm.layers.drop import DropPath  # noqa: E402

KERNELS = (7, 3, 3, 3)
MLP_RATIO = 4
BLOCK_EPS = 1e-6  # of norms in blocks and after stages; the others have torch's 1e-5


@dataclass(frozen=True)
class Size:
    """Sizes of the four stages.

    dims        channels
    depths      number of blocks
    strides     of the patch embedding, relative to the stage before
    heads       of the attention
    reductions  stride of the grid of keys and values relative to that of the queries
    """

    dims: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    strides: tuple[int, int, int, int] = (4, 2, 2, 1)  # SegFormer has 2 in the last place
    heads: tuple[int, int, int, int] = (1, 2, 5, 8)
    reductions: tuple[int, int, int, int] = (8, 4, 2, 1)

    @property
    def stride(self) -> int:
        """px per cell of the last map."""
        return math.prod(self.strides)


SIZES = {
    "mit_b0": Size((32, 64, 160, 256), (2, 2, 2, 2)),
    "mit_b1": Size((64, 128, 320, 512), (2, 2, 2, 2)),
    "mit_b2": Size((64, 128, 320, 512), (3, 4, 6, 3)),
    "mit_b3": Size((64, 128, 320, 512), (3, 4, 18, 3)),
    "mit_b4": Size((64, 128, 320, 512), (3, 8, 27, 3)),
    "mit_b5": Size((64, 128, 320, 512), (3, 6, 40, 3)),
    # the demo's: its images are small, so its last two maps lie at stride 8
    "scenes_mit": Size((32, 64, 96, 128), (1, 1, 2, 2), (4, 2, 1, 1), (1, 2, 4, 4), (8, 4, 2, 1)),
}


class PatchEmbed(nn.Module):
    """Overlapping patches: a strided convolution and a norm. [b,c,h,w] → [b,dim,h/stride,w/stride], rounded up."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Maps → tokens [b,n,dim] and their grid (rows, columns)."""
        maps = self.proj(maps)
        return self.norm(maps.flatten(2).transpose(1, 2)), (maps.shape[-2], maps.shape[-1])


class Attention(nn.Module):
    """Self-attention whose keys and values lie on a coarser grid."""

    def __init__(self, dim: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if reduction > 1:
            self.sr: nn.Conv2d | None = nn.Conv2d(dim, dim, reduction, reduction)
            self.norm = nn.LayerNorm(dim)
        else:
            self.sr = None

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens [b,n,dim] → [b,n,dim], and queries and keys [b,heads,·,dim/heads]."""
        b, n, dim = tokens.shape
        q = self.q(tokens).view(b, n, self.heads, -1).transpose(1, 2)
        coarse = tokens
        if self.sr is not None:
            maps = tokens.transpose(1, 2).reshape(b, dim, *grid)
            short = [kernel - side for kernel, side in zip(self.sr.kernel_size, grid, strict=True)]
            missing = [(value + abs(value)) // 2 for value in short]  # max(0, value), which a trace for ONNX would fix
            maps = F.pad(maps, (0, missing[1], 0, missing[0]))  # images below 32 px, which the original refuses
            coarse = self.norm(self.sr(maps).flatten(2).transpose(1, 2))
        k, v = self.kv(coarse).view(b, coarse.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, dim)), (q, k)


class Mlp(nn.Module):
    """Two layers with a depthwise 3×3 convolution between them, which takes the place of position embeddings."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * dim
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        hidden = self.fc1(tokens)
        maps = self.dwconv["dwconv"](hidden.transpose(1, 2).reshape(tokens.shape[0], -1, *grid))
        return self.fc2(F.gelu(maps.flatten(2).transpose(1, 2)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, reduction: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=BLOCK_EPS), nn.LayerNorm(dim, eps=BLOCK_EPS)
        self.attn, self.mlp = Attention(dim, heads, reduction), Mlp(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixed, pair = self.attn(self.norm1(tokens), grid)
        tokens = tokens + self.drop_path(mixed)
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), grid)), pair


class MixTransformer(nn.Module):
    def __init__(self, size: Size, drop_path: float) -> None:
        super().__init__()
        rates = torch.linspace(0, drop_path, sum(size.depths)).tolist()
        channels = (3, *size.dims[:3])
        for stage in range(4):
            dim, depth, before = size.dims[stage], size.depths[stage], sum(size.depths[:stage])
            heads, reduction = size.heads[stage], size.reductions[stage]
            blocks = [Block(dim, heads, reduction, rates[before + index]) for index in range(depth)]
            self.add_module(f"patch_embed{stage + 1}", PatchEmbed(channels[stage], dim, KERNELS[stage], size.strides[stage]))
            self.add_module(f"block{stage + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{stage + 1}", nn.LayerNorm(dim, eps=BLOCK_EPS))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Normalised f32[b,3,h,w] → four maps [b,dim,h/s,w/s], finest first (sides rounded up), and queries and keys
        [b,heads,n,dim/heads] of each block of the last stage, in order."""
        maps, features, pairs = images, [], []
        for stage in range(1, 5):
            tokens, grid = self.get_submodule(f"patch_embed{stage}")(maps)
            pairs = []
            for block in self.get_submodule(f"block{stage}").children():
                tokens, pair = block(tokens, grid)
                pairs.append(pair)
            tokens = self.get_submodule(f"norm{stage}")(tokens)
            maps = tokens.transpose(1, 2).reshape(images.shape[0], -1, *grid)
            features.append(maps)
        return features, pairs
