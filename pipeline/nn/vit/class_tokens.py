"""A timm ViT with one class token per class, whose attention maps can be recorded: images → tokens (WeakTr section 1.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators
from pipeline.nn.vit import backbone

define_missing_operators()
from timm.layers.attention import Attention  # noqa: E402
from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: E402

# The published resize of position embeddings samples at grid + 0.1 cells; kept, so that published weights give published
# maps
RESIZE_MARGIN = 0.1


class AttentionRecorder(Protocol):
    """Runs the attention of every block, and holds what the fusion of attention maps needs of it (nn/vit/fusion.py)."""

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """Normed tokens f32[b,n,dim] → output of the attention branch f32[b,n,dim], before residual and stochastic depth.

        layer: number of the block, from 0; attention: its timm module. bias: f32[n], added to the attention logits of each
        token as a key, or None.
        """
        ...


class ClassTokenVit(nn.Module):
    """Sequence: one token per class, then registers where the ViT has them, then the patches.

    dim, stride   channels of a token; px per cell, image sides must be multiples of it
    depth, heads  blocks; attention heads of each
    classes, registers   class tokens; register tokens
    """

    def __init__(
        self, vit: Any, classes: int, features: Literal["residual", "normed"], token_weight: Literal["each", "one"]
    ) -> None:
        """vit: what nn/vit/backbone.create returns. ValueError if it has no class token, or another attention than timm's
        plain one.

        features: tokens as they leave the last block (residual, published), where a few patches of large norm can outweigh
        all others, or after the ViT's final norm (normed). token_weight: each class token draws as much attention as the
        ViT's one did (published), or all of them together do: then the network starts as exactly the pretrained ViT, while c
        copies of its token take attention from the patches.
        """
        super().__init__()
        net = getattr(vit, "net", None)
        blocks = getattr(net, "blocks", [])
        if net is None or not len(blocks) or getattr(net, "cls_token", None) is None:
            raise ValueError("this method needs a ViT with a class token: set methods.<run>.backbone to vit in params.yaml")
        attention = blocks[0].attn
        if type(attention) is not Attention or attention.gate is not None or not hasattr(blocks[0], "drop_path1"):
            raise ValueError(
                f"the attention of this architecture ({type(attention).__name__}) is not the plain one whose maps can be "
                "fused; choose a DeiT, ViT or DINOv2 in train.model.architecture of the recipe"
            )
        self.net, self.normalise = net, vit.normalise
        self.dim, self.stride, self.classes = vit.dim, vit.stride, classes
        self.depth, self.heads = len(blocks), int(attention.num_heads)
        self.registers, self.token_weight = vit.prefix - 1, token_weight
        if features == "residual":
            self.net.norm = nn.Identity()
        self._use_tokens({"cls_token": net.cls_token.detach(), "pos_embed": net.pos_embed.detach()})

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.classes + self.registers

    def forward(self, images: Tensor, recorder: AttentionRecorder) -> tuple[Tensor, Tensor]:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of stride → class tokens f32[b,c,dim] and patches f32[b,dim,gh,gw]."""
        tokens = self._embedded(self.normalise(images))
        bias = None
        if self.token_weight == "one":
            bias = tokens.new_zeros(tokens.shape[1])
            bias[: self.classes] = -math.log(self.classes)
        for layer, block in enumerate(self.net.blocks):
            tokens = tokens + block.drop_path1(block.ls1(recorder.attend(layer, block.attn, block.norm1(tokens), bias)))
            tokens = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
        counts = [self.classes, self.registers, tokens.shape[1] - self.prefix]
        class_tokens, _, patches = self.net.norm(tokens).split(counts, dim=1)
        gh, gw = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        return class_tokens, patches.transpose(1, 2).reshape(len(images), self.dim, gh, gw)

    def load_initial(self, init: Path) -> None:
        """Weights of a plain ViT; its class token and that token's position are repeated for every class."""
        tensors = backbone.initial_tensors(self.net, self.registers + 1, init)
        if tensors is not None:
            weights.load_matching(self.net, self._repeated(tensors), init)

    def plain_weights(self, net: Any) -> dict[str, Tensor]:
        """State dict for `net`, a timm ViT of the same architecture with one class token: that token is the mean of the
        class tokens, position embeddings are resampled to net's grid (bicubic). Without the final norm, if this network
        applies none."""
        tensors = dict(self.net.state_dict())
        tensors["cls_token"] = tensors["cls_token"].mean(dim=1, keepdim=True)
        before = 0
        if not self.net.no_embed_class:
            of_tokens, of_patches = tensors["pos_embed"][:, : self.classes], tensors["pos_embed"][:, self.classes :]
            tensors["pos_embed"], before = (
                torch.cat([of_tokens.mean(dim=1, keepdim=True), of_patches], dim=1),
                1 + self.registers,
            )
        grid = list(net.patch_embed.grid_size)
        if tensors["pos_embed"].shape[1] != before + grid[0] * grid[1]:
            tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], grid, num_prefix_tokens=before)
        return tensors

    def _use_tokens(self, tensors: Mapping[str, Tensor]) -> None:
        repeated = self._repeated(tensors)
        self.net.cls_token = nn.Parameter(repeated["cls_token"].clone())
        self.net.pos_embed = nn.Parameter(repeated["pos_embed"].clone())

    def _repeated(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """State dict of a ViT with one class token → the same with one per class."""
        repeated = dict(tensors)
        if "cls_token" in repeated and repeated["cls_token"].shape[1] == 1:
            repeated["cls_token"] = repeated["cls_token"].expand(-1, self.classes, -1)
            if not self.net.no_embed_class and "pos_embed" in repeated:
                of_token, of_patches = repeated["pos_embed"][:, :1], repeated["pos_embed"][:, 1:]
                repeated["pos_embed"] = torch.cat([of_token.expand(-1, self.classes, -1), of_patches], dim=1)
        return repeated

    def _embedded(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w], normalised → tokens f32[b,n,dim] with their position embeddings."""
        net = self.net
        patches = net.patch_embed(images)
        b, gh, gw, dim = patches.shape
        prefix = net.cls_token if net.reg_token is None else torch.cat([net.cls_token, net.reg_token], dim=1)
        before = 0 if net.no_embed_class else self.prefix
        positions = self._resized(net.pos_embed[:, before:], (gh, gw))
        if before:
            prefix = prefix + net.pos_embed[:, :before]
        tokens = torch.cat([prefix.expand(b, -1, -1), patches.reshape(b, gh * gw, dim) + positions], dim=1)
        return net.norm_pre(net.pos_drop(tokens))

    def _resized(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        """Position embeddings f32[1,·,dim] of the patches of the ViT's own grid → those of `grid` (rows, columns)."""
        own = self.net.patch_embed.grid_size
        if grid == tuple(own):
            return positions
        square = positions.reshape(1, *own, -1).permute(0, 3, 1, 2)
        factors = [(new + RESIZE_MARGIN) / old for new, old in zip(grid, own, strict=True)]
        resized = F.interpolate(square, scale_factor=factors, mode="bicubic", align_corners=False)
        return resized.flatten(2).transpose(1, 2)
