"""WeakTr's network: images → CAM, class tokens' attention, their product, and that refined by patch attention.

Shared by methods/weaktr and methods/semples; docs/methods/weaktr.md says what is published. A method inherits the network,
so that its weights keep the published names. Shape letters: b images, c classes, p = gh * gw patches, k = heads * layers
attention maps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import Positive
from pipeline.core.contracts import ScoreMaps
from pipeline.imaging.pooling import Pool, pooled
from pipeline.nn import weights
from pipeline.nn.vit import fusion as attention_fusion
from pipeline.nn.vit.class_tokens import ClassTokenVit
from pipeline.nn.vit.coco_ids import COCO_IDS, COCO_USED_IDS


@dataclass(frozen=True)
class CamParams:
    """The part of train.model that builds the network.

    architecture        a timm ViT with plain attention (DeiT, ViT, DINOv2), or scenes_vit
    image_size          px; grid of the position embeddings, usually augment.size
    drop_path           stochastic depth
    features            tokens that the heads read: as they leave the last block (residual, published), or after the ViT's
                        final norm (normed)
    token_weight        attention that the class tokens draw: each as much as the ViT's own one did (published), or all of
                        them together as much as that one
    attention           what patch attention refines: fused cross attention × CAM, cross attention alone, or the patch CAM
                        alone
    patch_refine        whether patch attention refines it
    pool                cells of the patch CAM → its logit: gap mean of all (published), gmp maximum, topk mean of the
                        highest topk_share
    topk_share          share of the cells whose mean topk takes, above 0 to 1; not read for gap and gmp
    attention_pool      over tokens, of the features from which the fusion computes the weights of the attention maps
    reduction, feature_reduction   how many times narrower the fusion's two hidden layers are
    class_head          logit of a class token: mean of its channels (published), or a learned linear form of them
    patch_head          patches → CAM: 3×3 convolution (published) or 1×1
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    features: Literal["residual", "normed"]
    token_weight: Literal["each", "one"]
    attention: Literal["fused", "cross", "patch"]
    patch_refine: bool
    pool: Pool
    topk_share: Annotated[float, Field(gt=0, le=1)]
    attention_pool: Literal["max", "avg"]
    reduction: Positive
    feature_reduction: Positive
    class_head: Literal["mean", "linear"]
    patch_head: Literal["conv3", "conv1"]


FUSION = "adaptive_attention_fusion."
NETWORK_KEY = f"{FUSION}attn_head_ffn.0.weight"  # a file that holds the whole network has this key
PUBLISHED_PATCH = 16
PUBLISHED_SIZES = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
# params that weights depend on: with another value they would load without an error, or the error would not say why
WEIGHT_PARAMS = (
    "architecture", "features", "token_weight", "attention_pool", "reduction", "feature_reduction", "class_head",
    "patch_head",
)  # fmt: skip
KERNELS = {"conv3": 3, "conv1": 1}


@dataclass(frozen=True)
class BackboneOutputs:
    """Of one pass: class tokens f[b,c,dim], patches f[b,dim,gh,gw], and the recorded attention of all layers."""

    class_tokens: Tensor
    patches: Tensor
    attention: attention_fusion.StoredAttention | attention_fusion.RecomputedAttention


class CamNetwork(nn.Module):
    """A ViT with class tokens, a convolution that reads its patches, and the fusion of its attention.

    split: how the fusion cuts channels into heads, see fusion.AttentionFusion.
    """

    def __init__(
        self, classes: int, params: CamParams, family: Any, *, split: attention_fusion.HeadSplit = "interleaved"
    ) -> None:
        """family: pipeline.nn.vit.backbone."""
        super().__init__()
        self.cam = params
        plain_vit = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.backbone = ClassTokenVit(plain_vit, classes, params.features, params.token_weight)
        self.stride: int = self.backbone.stride
        dim, kernel = self.backbone.dim, KERNELS[params.patch_head]
        self.head = nn.Conv2d(dim, classes, kernel, padding=kernel // 2)
        if params.class_head == "linear":
            self.class_weight = nn.Parameter(torch.full((classes, dim), 1 / dim))  # starts as the mean
            self.class_bias = nn.Parameter(torch.zeros(classes))
        self.adaptive_attention_fusion = attention_fusion.AttentionFusion(
            dim,
            self.backbone.heads,
            self.backbone.depth,
            reduction=params.reduction,
            feature_reduction=params.feature_reduction,
            pool=params.attention_pool,
            split=split,
        )
        self._map_buffer = attention_fusion.MapBuffer()

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Any, *, keep_affinity: bool = False) -> ScoreMaps:
        """The fine CAM. Shapes as in contracts.ScoreMaps; tag logits are the mean of those of class tokens and coarse CAM;
        the affinity is the fused patch attention, made symmetric."""
        del options
        patches = self._patch_count(images)
        bytes_each = attention_fusion.bytes_of_maps(self.adaptive_attention_fusion, self.backbone.prefix + patches)
        budget = attention_fusion.GPU_BATCH_BYTES if images.is_cuda else attention_fusion.BATCH_BYTES
        at_once = max(1, budget // bytes_each)
        outputs: dict[str, list[Tensor]] = {"fine": [], "coarse_logits": [], "cls_logits": [], "affinity": []}
        for at in range(0, len(images), at_once):
            outputs_of_part = self._backbone_outputs(images[at : at + at_once], self._map_buffer)
            part = self._fused_maps(outputs_of_part, self.head, self.adaptive_attention_fusion)
            if keep_affinity:
                attention = self._patch_attention(outputs_of_part)
                part["affinity"] = (attention + attention.transpose(1, 2)) / 2
            for name, parts in outputs.items():
                parts += [part[name]] if name in part else []
        logits = (torch.cat(outputs["coarse_logits"]) + torch.cat(outputs["cls_logits"])) / 2
        return ScoreMaps(torch.cat(outputs["fine"]), torch.cat(outputs["affinity"]) if keep_affinity else None, logits)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Maps f32[b,c,gh,gw]: coarse (CAM), cross (fused cross attention), fused (their product), fine; logits f32[b,c]:
        cls_logits, coarse_logits, fine_logits; fusion_weights f32[b,layers,heads]; patch_attention f32[b,p,p]."""
        return self._inner_maps(self._backbone_outputs(images, self._map_buffer))

    def _inner_maps(self, outputs: BackboneOutputs) -> dict[str, Tensor]:
        """The tensors of `inspect`."""
        maps = self._fused_maps(outputs, self.head, self.adaptive_attention_fusion)
        fine_logits = maps["fine"].mean(dim=(2, 3))
        return maps | {"fine_logits": fine_logits, "patch_attention": self._patch_attention(outputs)}

    def _patch_count(self, images: Tensor) -> int:
        return images.shape[-2] * images.shape[-1] // self.stride**2

    def _backbone_outputs(self, images: Tensor, buffer: attention_fusion.MapBuffer) -> BackboneOutputs:
        """Under no_grad alone: attention maps are written in place into `buffer`, and read again where they are fused."""
        patches = self._patch_count(images)
        fusion, prefix = self.adaptive_attention_fusion, self.backbone.prefix
        recorder = attention_fusion.recorder_for(fusion, self.backbone.classes, prefix + patches, patches, buffer)
        class_tokens, features = self.backbone(images, recorder)
        return BackboneOutputs(class_tokens, features, recorder)

    def _fused_maps(
        self,
        outputs: BackboneOutputs,
        head: nn.Conv2d,
        fusion: attention_fusion.AttentionFusion,
        valid: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Maps and logits as `inspect` gives them, with gradient to head and fusion where it is enabled.

        valid: f32[b,gh,gw], 0 on padding, where the CAM is then 0; None: there is no padding.
        """
        b, _, gh, gw = outputs.patches.shape
        attention = outputs.attention
        attention.fusion = fusion
        maps, class_logits = head(outputs.patches).float(), self._class_logits(outputs.class_tokens).float()
        with full_precision(maps):
            weights, coarse, cross = attention.fuse(), maps.relu().flatten(2), attention.cross()
            if valid is not None:
                coarse = coarse * valid.flatten(1)[:, None]
            planes = self._planes(coarse, cross)
            fine = attention.spread(planes) if self.cam.patch_refine else planes
        named = {"coarse": coarse, "cross": cross, "fused": coarse * cross, "fine": fine}
        return {name: value.view(b, -1, gh, gw) for name, value in named.items()} | {
            "fusion_weights": attention_fusion.by_layer_and_head(weights, self.backbone.depth),
            "cls_logits": class_logits,
            "coarse_logits": self._pooled(maps, None if valid is None else valid > 0),
        }

    def _patch_attention(self, outputs: BackboneOutputs) -> Tensor:
        """f32[b,p,p]: row i holds how much patch i attends to each patch. After `_fused_maps` alone."""
        b, _, gh, gw = outputs.patches.shape
        identity = torch.eye(gh * gw, device=self.head.weight.device).expand(b, -1, -1)
        with full_precision(identity):
            return outputs.attention.spread(identity).transpose(1, 2)

    def _class_logits(self, tokens: Tensor) -> Tensor:
        """Class tokens [b,c,dim] → [b,c]."""
        if self.cam.class_head == "mean":
            return tokens.mean(dim=2)
        return (tokens * self.class_weight).sum(dim=2) + self.class_bias

    def _pooled(self, maps: Tensor, valid: Tensor | None) -> Tensor:
        """CAM before its ReLU f32[b,c,gh,gw], valid cells bool[b,gh,gw] → logits f32[b,c]."""
        return pooled(maps, valid, pool=self.cam.pool, topk_share=self.cam.topk_share)

    def _planes(self, coarse: Tensor, cross: Tensor) -> Tensor:
        """CAM and cross attention, f32[b,c,p] each → the planes f32[b,c,p] that patch attention refines."""
        if self.cam.attention == "patch":
            return coarse
        return cross if self.cam.attention == "cross" else cross * coarse


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast: fused maps have values around 1 / n², which half precision would round to nothing."""
    return torch.autocast(like.device.type, enabled=False)


def published_name(name: str) -> str:
    """Our key name → the authors'."""
    return name.removeprefix("backbone.net.")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours; COCO's 90 ids → 80 classes; the final norm, which nobody applies, is dropped."""
    same_names = ("head.", FUSION)
    ours = {
        name if name.startswith(same_names) else f"backbone.net.{name}": value
        for name, value in tensors.items()
        if not name.startswith("norm.")
    }
    tokens = ours.get("backbone.net.cls_token")
    if tokens is None or tokens.shape[1] != COCO_IDS:
        return ours
    used, positions = [number - 1 for number in COCO_USED_IDS], ours["backbone.net.pos_embed"]
    ours["backbone.net.cls_token"] = tokens[:, used]
    ours["backbone.net.pos_embed"] = torch.cat([positions[:, used], positions[:, COCO_IDS:]], dim=1)
    return ours | {name: ours[name][used] for name in ("head.weight", "head.bias") if name in ours}


def check_alike(metadata: Mapping[str, str], params: CamParams, classes: Sequence[str], init: Path) -> None:
    """ValueError where a model.safetensors was trained with other params or classes than those it is now to be used with.

    metadata: of the file, as stage train writes it; init: the file, for the error.
    """
    trained_with = json.loads(metadata.get("section", "{}")).get("model", {})
    different = [name for name in WEIGHT_PARAMS if name in trained_with and trained_with[name] != getattr(params, name)]
    if different:
        listed = "; ".join(f"{name} {trained_with[name]!r}, not {getattr(params, name)!r}" for name in different)
        raise ValueError(f"{init} was trained with {listed}: set the same in train.model of the recipe")
    known = json.loads(metadata.get("labels", "null"))
    if known is not None and known != list(classes):
        raise ValueError(f"{init} knows the classes {', '.join(known)}; the data set has {', '.join(classes)}")


def published(
    state_dict: Mapping[str, Any], attention_pool: Literal["max", "avg"]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The authors' weights, in a wrapper {"model": …} or not → the values of CamParams that they published, and the tensors
    in our names. Width, grid and number of classes are read off the tensors. ValueError lists the keys that miss."""
    tensors = renamed(weights.unwrapped(state_dict))
    needed = [
        "backbone.net.pos_embed", "backbone.net.cls_token", "head.weight", NETWORK_KEY, f"{FUSION}attn_feat_ffn.0.weight",
    ]  # fmt: skip
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise ValueError(f"these are no weights of WeakTr's step 1: {', '.join(map(published_name, missing))} missing")
    positions, tokens, _, head_ffn, feature_ffn = (tensors[name] for name in needed)
    classes, dim = tokens.shape[1:]
    if dim not in PUBLISHED_SIZES:
        raise ValueError(f"there is no published backbone with {dim} channels; known are {PUBLISHED_SIZES}")
    values = {
        "architecture": PUBLISHED_SIZES[dim],
        "image_size": PUBLISHED_PATCH * round((positions.shape[1] - classes) ** 0.5),
        "drop_path": 0.1,
        "features": "residual",
        "token_weight": "each",
        "attention": "fused",
        "patch_refine": True,
        "pool": "gap",
        "topk_share": 1.0,
        "attention_pool": attention_pool,
        "reduction": max(1, head_ffn.shape[1] // head_ffn.shape[0]),
        "feature_reduction": max(1, feature_ffn.shape[1] // feature_ffn.shape[0]),
        "class_head": "mean",
        "patch_head": "conv3",
    }
    return values, tensors
