"""Attention maps of all layers and heads → one weighted mean per image: WeakTr's adaptive attention fusion (1.2, 1.3).

Shape letters: b images, c class tokens, p patches, n tokens (class tokens, registers, patches; in this order),
k = heads * layers maps, head-major: map number = head * layers + layer.

The weights of the mean depend on the features of all layers, so they are known only after the last block. A recorder
(class_tokens.AttentionRecorder) runs the attention of each block and holds what the mean needs until then:
  AttentionRows        training: of each map only the class tokens' rows and the mean row of the patches, (c + 1) · p values
                       instead of n². Pooled score maps need no more: mean_p Σ_j R[p,j] Q[j] = Σ_j (mean_p R[p,j]) Q[j].
  StoredAttention      score maps: every map, in a buffer that is used again by the next call
  RecomputedAttention  score maps of large images: queries and keys alone; maps are computed again, a few rows at a time
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STORED_BYTES = 2**29  # the most that the maps of one image may take; those of larger images are recomputed
BATCH_BYTES = 2**26  # score maps are computed for several images at once up to so many bytes of maps: more run no faster
GPU_STORED_BYTES = GPU_BATCH_BYTES = 2**32  # the same on a GPU, which has the memory and would idle over small parts
CACHE_BYTES = 2**21  # of maps that are computed at a time on a CPU, so that they stay in its cache
RECOMPUTED_ROWS = 256  # rows of a map that RecomputedAttention computes at a time
HeadSplit = Literal["interleaved", "heads"]


class AttentionFusion(nn.Module):
    """Features of each layer's attention branch → weights of the heads' attention maps. Parameters are named as
    published."""

    def __init__(
        self,
        dim: int,
        heads: int,
        layers: int,
        *,
        reduction: int,
        feature_reduction: int,
        pool: Literal["max", "avg"],
        split: HeadSplit = "interleaved",
    ) -> None:
        """dim: channels of a token, all heads together; heads: of each layer.

        reduction, feature_reduction: how many times narrower the two hidden layers are than their inputs.
        pool: over tokens, of the features.
        split: which dim / heads channels are the features of a head. interleaved: every heads-th channel of the branch's
        output, i.e. after the projection, which mixes the heads; so the published weights were trained. heads: the head's
        own attended values, before the projection.
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

    def pooled(self, features: Tensor) -> Tensor:
        """Features f[b,n,dim] of one layer → f32[b,dim], pooled over tokens, without gradient."""
        features = features.detach().float()
        return features.amax(dim=1) if self.pool == "max" else features.mean(dim=1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features f32[b,layers,dim] → weights f32[b,k] in 0..1."""
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


def _queries_keys_values(attention: Any, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed tokens [b,n,dim] → queries, keys and values, each [b,heads,n,width]."""
    b, n, _ = tokens.shape
    qkv = attention.qkv(tokens).view(b, n, 3, attention.num_heads, attention.head_dim).permute(2, 0, 3, 1, 4)
    queries, keys, values = qkv.unbind(0)
    return attention.q_norm(queries), attention.k_norm(keys), values


def _branch_output(fusion: AttentionFusion, attention: Any, attended: Tensor) -> tuple[Tensor, Tensor]:
    """Attended values [b,heads,n,width] → the branch's output [b,n,dim], and the fusion's pooled features f32[b,dim] of this
    layer."""
    b, _, n, _ = attended.shape
    concatenated = attended.transpose(1, 2).reshape(b, n, -1)
    output = attention.proj_drop(attention.proj(attention.norm(concatenated)))
    return output, fusion.pooled(output if fusion.split == "interleaved" else concatenated)


def _cache_slices(maps: int, n: int, like: Tensor) -> Iterator[slice]:
    """Slices of `maps` maps of n² values each, of so many as stay in a processor's cache; all of them on a GPU."""
    at_once = maps if like.is_cuda else max(1, CACHE_BYTES // (4 * n * n))
    return (slice(at, at + at_once) for at in range(0, maps, at_once))


def _head_slices(heads: int, like: Tensor) -> Iterator[slice]:
    """Slices of heads whose maps are computed together: one head on a CPU, all of them on a GPU."""
    at_once = heads if like.is_cuda else 1
    return (slice(at, at + at_once) for at in range(0, heads, at_once))


def _attention_maps(queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled queries […,rows,width], keys […,n,width], bias [n] of the keys → attention […,rows,n]."""
    logits = queries @ keys.transpose(-1, -2)
    return (logits if bias is None else logits.add_(bias)).softmax(dim=-1)


class AttentionRows:
    """For training: of every map the class tokens' rows and the mean row of the patches, without gradient; the fused ones
    have a gradient to the fusion alone."""

    def __init__(self, fusion: AttentionFusion, classes: int, patch_weights: Tensor) -> None:
        """patch_weights: f32[b,p], of each patch's row in the mean row; they sum to 1 per image."""
        self.fusion, self.classes, self.patch_weights = fusion, classes, patch_weights
        self.pooled_features: list[Tensor] = []  # f32[b,dim] of each layer
        b, patches = patch_weights.shape
        self.rows = patch_weights.new_empty(b, fusion.heads, fusion.layers, classes + 1, patches)

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.AttentionRecorder."""
        queries, keys, values = _queries_keys_values(attention, tokens)
        dropout = attention.attn_drop.p if attention.training else 0.0
        mask = None if bias is None else bias.to(queries.dtype).expand(1, 1, len(bias), len(bias))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
        output, pooled = _branch_output(self.fusion, attention, attended)
        self.pooled_features.append(pooled)
        self.record(layer, queries.detach() * attention.scale, keys.detach(), bias)
        return output

    @torch.no_grad()
    def record(self, layer: int, queries: Tensor, keys: Tensor, bias: Tensor | None) -> None:
        """Writes the rows of one layer's maps. Scaled queries and keys [b,heads,n,width], bias [n]."""
        (b, patches), (heads, n) = self.patch_weights.shape, queries.shape[1:3]
        for images in _cache_slices(b, n, queries):
            patch_weights = self.patch_weights[images, None, None].to(queries.dtype)  # [images,1,1,p]
            for part in _head_slices(heads, queries):
                maps = _attention_maps(queries[images, part], keys[images, part], bias)
                self.rows[images, part, layer, : self.classes] = maps[..., : self.classes, -patches:]
                mean_row = patch_weights.to(maps.dtype) @ maps[..., -patches:, -patches:]
                self.rows[images, part, layer, self.classes :] = mean_row

    def fused(self) -> tuple[Tensor, Tensor]:
        """Cross attention f32[b,c,p] and the mean row of patch attention f32[b,1,p]."""
        weights = self.fusion(torch.stack(self.pooled_features, dim=1))
        b, k = weights.shape
        mean = (weights[:, None] / k @ self.rows.view(b, k, -1)).view(b, self.classes + 1, -1)
        return mean[:, : self.classes], mean[:, self.classes :]


class MapBuffer:
    """Memory for the maps of StoredAttention, allocated once: allocating it for every image would cost a tenth more time."""

    def __init__(self) -> None:
        self.values = torch.empty(0)

    def take(self, count: int, like: Tensor) -> Tensor:
        """`count` values of any content, of like's type and device; they are overwritten by whoever takes next."""
        if len(self.values) < count or (self.values.dtype, self.values.device) != (like.dtype, like.device):
            self.values = like.new_empty(count)
        return self.values[:count]


class StoredAttention:
    """For score maps: every map is stored until the weights are known. Without gradient to the maps."""

    def __init__(self, fusion: AttentionFusion, classes: int, patches: int, buffer: MapBuffer) -> None:
        self.fusion, self.classes, self.patches, self.buffer = fusion, classes, patches, buffer
        self.pooled_features: list[Tensor] = []  # f32[b,dim] of each layer
        self.maps = self.mean = torch.empty(0)  # [b,layers,heads,n,n]; [b,n,n]

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.AttentionRecorder."""
        queries, keys, values = _queries_keys_values(attention, tokens)
        b, heads, n, _ = queries.shape
        if layer == 0:
            memory = self.buffer.take(b * self.fusion.layers * heads * n * n, queries)
            self.maps = memory.view(b, self.fusion.layers, heads, n, n)
        queries, attended = queries * attention.scale, torch.empty_like(values, memory_format=torch.contiguous_format)
        if queries.is_cuda:  # every kernel takes all images and heads
            maps = _attention_maps(queries, keys, bias)
            self.maps[:, layer] = maps
            attended = maps @ values
        for image in range(0 if queries.is_cuda else b):
            for head_slice in _cache_slices(heads, n, queries):
                maps = self.maps[image, layer, head_slice]
                torch.bmm(queries[image, head_slice], keys[image, head_slice].transpose(1, 2), out=maps)
                if bias is not None:
                    maps.add_(bias)
                torch.softmax(maps, dim=-1, out=maps)
                torch.bmm(maps, values[image, head_slice], out=attended[image, head_slice])
        output, pooled = _branch_output(self.fusion, attention, attended)
        self.pooled_features.append(pooled)
        return output

    def fuse(self) -> Tensor:
        """Weights f32[b,k]. To be called after the last block and before `cross` and `spread`; the maps may be overwritten
        after it, unless a gradient to the fusion is to pass through them."""
        weights = self.fusion(torch.stack(self.pooled_features, dim=1))
        (b, k), n = weights.shape, self.maps.shape[-1]
        layer_major = by_layer_and_head(weights, self.fusion.layers).reshape(b, 1, k).to(self.maps.dtype)
        # divided last: in half precision, small maps would underflow
        self.mean = (layer_major @ self.maps.view(b, k, n * n)).view(b, n, n).float() / k
        return weights

    def cross(self) -> Tensor:
        """Cross attention f32[b,c,p]: the class tokens' rows, the patches' columns."""
        return self.mean[:, : self.classes, -self.patches :]

    def spread(self, planes: Tensor) -> Tensor:
        """f32[b,c,p] → Σ_j R[p,j] planes[c,j], R the patch attention."""
        return planes @ self.mean[:, -self.patches :, -self.patches :].transpose(1, 2)


class RecomputedAttention:
    """For score maps of large images: as StoredAttention, but no map is ever whole; memory grows with n, not with n²."""

    def __init__(self, fusion: AttentionFusion, classes: int, patches: int) -> None:
        self.fusion, self.classes, self.patches = fusion, classes, patches
        self.pooled_features: list[Tensor] = []  # f32[b,dim] of each layer
        self.queries_and_keys: list[tuple[Tensor, Tensor]] = []  # scaled queries and keys [b,heads,n,width] of each layer
        self.bias: Tensor | None = None
        self.map_weights = torch.empty(0)  # f32[b,layers,heads], divided by k

    def attend(self, layer: int, attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """As class_tokens.AttentionRecorder."""
        queries, keys, values = _queries_keys_values(attention, tokens)
        self.bias, n = bias, tokens.shape[1]
        mask = None if bias is None else bias.to(queries.dtype).expand(1, 1, n, n)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        output, pooled = _branch_output(self.fusion, attention, attended)
        self.pooled_features.append(pooled)
        self.queries_and_keys.append((queries * attention.scale, keys))
        return output

    def fuse(self) -> Tensor:
        """Weights f32[b,k]. To be called after the last block and before `cross` and `spread`."""
        weights = self.fusion(torch.stack(self.pooled_features, dim=1))
        self.map_weights = by_layer_and_head(weights / weights.shape[1], self.fusion.layers)
        return weights

    def cross(self) -> Tensor:
        """As StoredAttention.cross."""
        return self._rows(slice(0, self.classes))

    def spread(self, planes: Tensor) -> Tensor:
        """As StoredAttention.spread."""
        first = self.queries_and_keys[0][0].shape[2] - self.patches
        parts = [
            planes @ self._rows(slice(first + at, first + min(at + RECOMPUTED_ROWS, self.patches))).transpose(1, 2)
            for at in range(0, self.patches, RECOMPUTED_ROWS)
        ]
        return torch.cat(parts, dim=-1)

    def _rows(self, rows: slice) -> Tensor:
        """f32[b,rows,p]: these rows of the fused map, patches' columns."""
        total: Tensor | None = None
        for layer, (queries, keys) in enumerate(self.queries_and_keys):
            for heads in _head_slices(queries.shape[1], queries):
                maps = _attention_maps(queries[:, heads, rows], keys[:, heads], self.bias)[..., -self.patches :]
                weighted = (maps.float() * self.map_weights[:, layer, heads, None, None]).sum(dim=1)
                total = weighted if total is None else total.add_(weighted)
        assert total is not None  # every ViT has a layer
        return total


def recorder_for(
    fusion: AttentionFusion, classes: int, tokens: int, patches: int, buffer: MapBuffer
) -> StoredAttention | RecomputedAttention:
    """For the score maps of images of `tokens` tokens, of which the last `patches` are patches."""
    on_gpu = next(fusion.parameters()).is_cuda
    if bytes_of_maps(fusion, tokens) <= (GPU_STORED_BYTES if on_gpu else STORED_BYTES):
        return StoredAttention(fusion, classes, patches, buffer)
    return RecomputedAttention(fusion, classes, patches)


def bytes_of_maps(fusion: AttentionFusion, tokens: int) -> int:
    """Of all maps of one image, in single precision."""
    return 4 * fusion.heads * fusion.layers * tokens * tokens
