"""Attention maps of all layers and heads → one weighted mean per image: WeakTr's adaptive attention fusion (sections 1.2, 1.3).

Shape letters: b images, c class tokens, p patches, n tokens (class tokens, registers, patches; in this order),
k = heads * layers maps, head-major: map number = head * layers + layer.

The weights of the mean depend on all layers, so they are known only after the last block. Three ways to wait for them:
  Sketch      training: of each map only the class tokens' rows and the mean row of the patches, (c + 1) · p values instead
              of n². Pooled maps need no more: mean_p Σ_j R[p,j] Q[j] = Σ_j (mean_p R[p,j]) Q[j].
  Kept        score maps: every map once, in a buffer that lives on between calls
  Recomputed  score maps of large images: queries and keys alone; maps are made again, a few rows at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT_BYTES = 2**29  # the most that the maps of one image may take; those of larger images are recomputed
TOGETHER_BYTES = 2**26  # images share a batch up to here: larger batches run no faster
Split = Literal["interleaved", "heads"]
CACHE_BYTES = 2**21  # of maps that are made at a time on a CPU: what stays in its cache is cheap
ROWS = 256  # rows of a map that Recomputed makes at a time


class AttentionFusion(nn.Module):
    """What each attention branch put out → how much its maps count. Parameters are named as published."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        *,
        reduction: int,
        feature_reduction: int,
        pool: Literal["max", "avg"],
        split: Split = "interleaved",
    ) -> None:
        """reduction, feature_reduction: how many times narrower the two hidden layers are.

        split: what tells of a head. interleaved: every heads-th channel of the branch's output, which the projection has mixed: no
        true slice of a head, but what the published weights were trained with. heads: what the head itself gathered, before the
        projection.
        """
        super().__init__()
        maps, width = heads * layers, dim // heads
        self.heads, self.layers, self.pool, self.split = heads, layers, pool, split
        hidden = max(1, maps // reduction)
        self.attn_head_ffn = nn.Sequential(
            nn.Linear(maps, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, maps, bias=False), nn.Sigmoid()
        )
        narrow = max(1, width // feature_reduction)
        self.attn_feat_ffn = nn.Sequential(nn.Linear(width, narrow), nn.Linear(narrow, 1))

    def pooled(self, branch: Tensor) -> Tensor:
        """Output of one attention branch, or of its heads laid end to end, [b,n,dim] → f32[b,dim], without gradient."""
        branch = branch.detach().float()
        return branch.amax(dim=1) if self.pool == "max" else branch.mean(dim=1)

    def forward(self, pooled: Tensor) -> Tensor:
        """f32[b,layers,dim] → weights [b,k] in 0..1."""
        b = len(pooled)
        if self.split == "interleaved":  # channel i goes to pseudo-head i mod heads
            by_head = pooled.view(b, self.layers, -1, self.heads).permute(0, 3, 1, 2)
        else:
            by_head = pooled.view(b, self.layers, self.heads, -1).transpose(1, 2)
        features = by_head.flatten(1, 2)  # [b,k,dim/heads]
        return self.attn_head_ffn(self.attn_feat_ffn(features)[..., 0])


def by_layer_and_head(weights: Tensor, layers: int) -> Tensor:
    """[b,k] → [b,layers,heads]."""
    return weights.view(len(weights), -1, layers).transpose(1, 2)


def _projected(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed tokens [b,n,dim] → queries, keys and values, each [b,heads,n,width]."""
    b, n, _ = tokens.shape
    three = attention.qkv(tokens).view(b, n, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = three.unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _branch(fusion: AttentionFusion, attention: Any, mixed: Tensor) -> tuple[Tensor, Tensor]:
    """[b,heads,n,width] → [b,n,dim]: the last steps of an attention branch; and f32[b,dim], what the fusion weighs it by."""
    b, _, n, _ = mixed.shape
    laid = mixed.transpose(1, 2).reshape(b, n, -1)
    branch = attention.proj_drop(attention.proj(attention.norm(laid)))
    return branch, fusion.pooled(branch if fusion.split == "interleaved" else laid)


def _in_cache(maps: int, n: int, like: Tensor) -> Iterator[slice]:
    """Slices of so many maps of n² values each as stay in a processor's cache; all of them on a GPU."""
    together = maps if like.is_cuda else max(1, CACHE_BYTES // (4 * n * n))
    return (slice(at, at + together) for at in range(0, maps, together))


def _maps(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled queries [m,rows,width], keys [m,n,width], bias [n] → attention [m,rows,n]."""
    logits = queries @ keys.transpose(1, 2)
    return (logits if bias is None else logits.add_(bias)).softmax(dim=-1)


class Sketch:
    """For training: the fused class rows and mean patch row, with gradient to the weights alone."""

    def __init__(self, fusion: AttentionFusion, classes: int, share: Tensor) -> None:
        """share: f32[b,p], how much each patch counts in the mean row; rows sum to 1."""
        self.fusion, self.classes, self.share = fusion, classes, share
        self.pooled: list[Tensor] = []
        b, patches = share.shape
        self.rows = share.new_empty(b, fusion.heads, fusion.layers, classes + 1, patches)

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.Watch."""
        queries, keys, values = _projected(attention, tokens)
        dropped = attention.attn_drop.p if attention.training else 0.0
        mask = None if bias is None else bias.to(queries.dtype).expand(1, 1, len(bias), len(bias))
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropped)
        branch, pooled = _branch(self.fusion, attention, mixed)
        self.pooled.append(pooled)
        self.keep(layer, queries.detach() * attention.scale, keys.detach(), bias)
        return branch

    @torch.no_grad()
    def keep(self, layer: int, queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
        """What the pooled maps need of one layer's maps: scaled queries and keys [b,heads,n,width]."""
        (b, patches), (heads, n) = self.share.shape, queries.shape[1:3]
        for some in _in_cache(b, n, queries):
            share = self.share[some, None].to(queries.dtype)
            for head in range(heads):
                rows = _maps(queries[some, head], keys[some, head], bias)
                self.rows[some, head, layer, : self.classes] = rows[:, : self.classes, -patches:]
                self.rows[some, head, layer, self.classes :] = share.to(rows.dtype) @ rows[:, -patches:, -patches:]

    def fused(self) -> tuple[Tensor, Tensor]:
        """Cross attention f32[b,c,p] and the mean row of patch attention f32[b,1,p]."""
        weights = self.fusion(torch.stack(self.pooled, dim=1))
        b, k = weights.shape
        mean = (weights[:, None] / k @ self.rows.view(b, k, -1)).view(b, self.classes + 1, -1)
        return mean[:, : self.classes], mean[:, self.classes :]


class Room:
    """Memory that is used again: taking it afresh for every image would cost a tenth more time."""

    def __init__(self) -> None:
        self.flat = torch.empty(0)

    def take(self, count: int, like: Tensor) -> Tensor:
        """`count` values of any content, of like's type and device."""
        if len(self.flat) < count or (self.flat.dtype, self.flat.device) != (like.dtype, like.device):
            self.flat = like.new_empty(count)
        return self.flat[:count]


class Kept:
    """For score maps: every map is kept until the weights are known. Without gradient."""

    def __init__(self, fusion: AttentionFusion, classes: int, patches: int, room: Room) -> None:
        self.fusion, self.classes, self.patches, self.room = fusion, classes, patches, room
        self.pooled: list[Tensor] = []
        self.maps = self.mean = torch.empty(0)  # [b,layers,heads,n,n]; [b,n,n]

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.Watch."""
        queries, keys, values = _projected(attention, tokens)
        b, heads, n, _ = queries.shape
        if layer == 0:
            room = self.room.take(b * self.fusion.layers * heads * n * n, queries)
            self.maps = room.view(b, self.fusion.layers, heads, n, n)
        queries, mixed = queries * attention.scale, torch.empty_like(values, memory_format=torch.contiguous_format)
        for image in range(b):
            for some in _in_cache(heads, n, queries):
                maps = self.maps[image, layer, some]
                torch.bmm(queries[image, some], keys[image, some].transpose(1, 2), out=maps)
                if bias is not None:
                    maps.add_(bias)
                torch.softmax(maps, dim=-1, out=maps)
                torch.bmm(maps, values[image, some], out=mixed[image, some])
        branch, pooled = _branch(self.fusion, attention, mixed)
        self.pooled.append(pooled)
        return branch

    def weigh(self) -> Tensor:
        """After the last block: weights f32[b,k]; the maps are fused and may be overwritten."""
        weights = self.fusion(torch.stack(self.pooled, dim=1))
        (b, k), n = weights.shape, self.maps.shape[-1]
        each = by_layer_and_head(weights, self.fusion.layers).reshape(b, 1, k).to(self.maps.dtype)
        # divided last: in half precision, small maps would underflow
        self.mean = (each @ self.maps.view(b, k, n * n)).view(b, n, n).float() / k
        return weights

    def cross(self) -> Tensor:
        """Cross attention f32[b,c,p]: the class tokens' rows, the patches' columns."""
        return self.mean[:, : self.classes, -self.patches :]

    def spread(self, planes: Tensor) -> Tensor:
        """f32[b,c,p] → Σ_j R[p,j] planes[c,j], R the patch attention."""
        return planes @ self.mean[:, -self.patches :, -self.patches :].transpose(1, 2)


class Recomputed:
    """For score maps of large images: as Kept, but no map is ever whole; memory grows with n, not with n²."""

    def __init__(self, fusion: AttentionFusion, classes: int, patches: int) -> None:
        self.fusion, self.classes, self.patches = fusion, classes, patches
        self.pooled: list[Tensor] = []
        self.asked: list[tuple[Tensor, Tensor]] = []  # queries and keys by layer
        self.bias: Tensor | None = None
        self.each = torch.empty(0)  # [b,layers,heads]

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.Watch."""
        queries, keys, values = _projected(attention, tokens)
        self.bias, n = bias, tokens.shape[1]
        mask = None if bias is None else bias.to(queries.dtype).expand(1, 1, n, n)
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        branch, pooled = _branch(self.fusion, attention, mixed)
        self.pooled.append(pooled)
        self.asked.append((queries * attention.scale, keys))
        return branch

    def weigh(self) -> Tensor:
        """After the last block: weights f32[b,k]."""
        weights = self.fusion(torch.stack(self.pooled, dim=1))
        self.each = by_layer_and_head(weights / weights.shape[1], self.fusion.layers)
        return weights

    def cross(self) -> Tensor:
        """As Kept.cross."""
        return self._rows(slice(0, self.classes))

    def spread(self, planes: Tensor) -> Tensor:
        """As Kept.spread."""
        first = self.asked[0][0].shape[2] - self.patches
        parts = [
            planes @ self._rows(slice(first + at, first + min(at + ROWS, self.patches))).transpose(1, 2)
            for at in range(0, self.patches, ROWS)
        ]
        return torch.cat(parts, dim=-1)

    def _rows(self, rows: slice) -> Tensor:
        """Some rows of the fused map, patches' columns: f32[b,rows,p]."""
        total: Tensor | None = None
        for layer, (queries, keys) in enumerate(self.asked):
            for head in range(queries.shape[1]):
                part = _maps(queries[:, head, rows], keys[:, head], self.bias)[..., -self.patches :]
                share = part.float() * self.each[:, layer, head, None, None]
                total = share if total is None else total.add_(share)
        assert total is not None  # every ViT has a layer
        return total


def watch_for(fusion: AttentionFusion, classes: int, tokens: int, patches: int, room: Room) -> Kept | Recomputed:
    """What keeps the maps of images with so many tokens."""
    if bytes_of_maps(fusion, tokens) <= KEPT_BYTES:
        return Kept(fusion, classes, patches, room)
    return Recomputed(fusion, classes, patches)


def bytes_of_maps(fusion: AttentionFusion, tokens: int) -> int:
    """Of one image, in single precision."""
    return 4 * fusion.heads * fusion.layers * tokens * tokens
