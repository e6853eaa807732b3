"""WeakTr's network: images → CAM, class tokens' attention, their product, and that refined by patch attention.

What methods/weaktr.py and methods/semples.py share; docs/methods/weaktr.md says what is published. A method inherits the network, so that
its weights keep the published names. Shape letters: b images, c classes, p = gh * gw patches, k = heads * layers attention maps.
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
from pipeline.nn.vit import fusion as fuse
from pipeline.nn.vit.class_tokens import ClassTokenVit
from pipeline.nn.vit.coco_ids import COCO_IDS, COCO_USED_IDS


@dataclass(frozen=True)
class CamParams:
    """The part of train.<m>.model that builds the network.

    architecture        a timm ViT with plain attention (DeiT, ViT, DINOv2), or scenes_vit
    image_size          px; grid of the position embeddings, usually augment.size
    drop_path           stochastic depth
    features            what the heads read: the last block's residual stream (published), or that after the ViT's final norm
    token_weight        attention drawn by class tokens: each as much as the ViT's own one did (published), or one between them
    attention           what patch attention refines: fused cross attention × CAM, cross attention alone, or the patch CAM alone
    patch_refine        false leaves that refinement out
    pool                cells of the patch CAM → its logit: gap mean of all (published), gmp maximum, topk mean of the highest
                        topk_share
    topk_share          share of the cells; only topk uses it
    attention_pool      over tokens, of the features that weigh the attention maps
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
MARK = f"{FUSION}attn_head_ffn.0.weight"  # a file that holds the whole network has this key
PUBLISHED_PATCH = 16
PUBLISHED_SIZES = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
# what weights were trained with: another value would load just as well, or not say why it does not
TRAINED_WITH = (
    "architecture", "features", "token_weight", "attention_pool", "reduction", "feature_reduction", "class_head", "patch_head",
)  # fmt: skip
KERNELS = {"conv3": 3, "conv1": 1}


@dataclass(frozen=True)
class Looked:
    """What one pass of the backbone leaves: class tokens [b,c,dim], patches [b,dim,gh,gw], and the attention that was watched."""

    tokens: Tensor
    patches: Tensor
    watch: fuse.Kept | fuse.Recomputed


class CamNetwork(nn.Module):
    """A ViT with class tokens, a convolution that reads its patches, and the fusion of its attention.

    split: how the fusion cuts channels into heads, see fusion.AttentionFusion.
    """

    def __init__(self, classes: int, params: CamParams, family: Any, *, split: fuse.Split = "interleaved") -> None:
        """family: pipeline.nn.vit.backbone."""
        super().__init__()
        self.cam = params
        plain = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.backbone = ClassTokenVit(plain, classes, params.features, params.token_weight)
        self.stride: int = self.backbone.stride
        dim, kernel = self.backbone.dim, KERNELS[params.patch_head]
        self.head = nn.Conv2d(dim, classes, kernel, padding=kernel // 2)
        if params.class_head == "linear":
            self.class_weight = nn.Parameter(torch.full((classes, dim), 1 / dim))  # starts as the mean
            self.class_bias = nn.Parameter(torch.zeros(classes))
        self.adaptive_attention_fusion = fuse.AttentionFusion(
            dim,
            self.backbone.heads,
            self.backbone.depth,
            reduction=params.reduction,
            feature_reduction=params.feature_reduction,
            pool=params.attention_pool,
            split=split,
        )
        self._room = fuse.Room()

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Any, *, keep_affinity: bool = False) -> ScoreMaps:
        """The fine CAM. Shapes as in contracts.ScoreMaps; tag logits are the mean of those of class tokens and coarse CAM; the
        affinity is the fused patch attention, made symmetric."""
        del options
        patches = self._patches(images)
        each = fuse.bytes_of_maps(self.adaptive_attention_fusion, self.backbone.prefix + patches)
        together = max(1, fuse.TOGETHER_BYTES // each)
        found: dict[str, list[Tensor]] = {"fine": [], "coarse_logits": [], "cls_logits": [], "affinity": []}
        for at in range(0, len(images), together):
            some = images[at : at + together]
            looked = self._look(some, self._room)
            part = self._fuse(looked, self.head, self.adaptive_attention_fusion)
            if keep_affinity:
                attention = self._patch_attention(looked.watch, len(some), patches)
                part["affinity"] = (attention + attention.transpose(1, 2)) / 2
            for name, parts in found.items():
                parts += [part[name]] if name in part else []
        logits = (torch.cat(found["coarse_logits"]) + torch.cat(found["cls_logits"])) / 2
        return ScoreMaps(torch.cat(found["fine"]), torch.cat(found["affinity"]) if keep_affinity else None, logits)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Maps f32[b,c,gh,gw]: coarse (CAM), cross (fused cross attention), fused (their product), fine; logits f32[b,c]:
        cls_logits, coarse_logits, fine_logits; fusion_weights f32[b,layers,heads]; patch_attention f32[b,p,p]."""
        return self._inner(self._look(images, self._room))

    def _inner(self, looked: Looked) -> dict[str, Tensor]:
        """What `inspect` gives."""
        b, _, gh, gw = looked.patches.shape
        found = self._fuse(looked, self.head, self.adaptive_attention_fusion)
        attention = self._patch_attention(looked.watch, b, gh * gw)
        return found | {"fine_logits": found["fine"].mean(dim=(2, 3)), "patch_attention": attention}

    def _patches(self, images: Tensor) -> int:
        return images.shape[-2] * images.shape[-1] // self.stride**2

    def _look(self, images: Tensor, room: fuse.Room) -> Looked:
        """Under no_grad alone: the maps are written in place into `room`, and read again by whatever fuses them."""
        patches = self._patches(images)
        fusion, prefix = self.adaptive_attention_fusion, self.backbone.prefix
        watch = fuse.watch_for(fusion, self.backbone.classes, prefix + patches, patches, room)
        tokens, features = self.backbone(images, watch)
        return Looked(tokens, features, watch)

    def _fuse(
        self, looked: Looked, head: nn.Conv2d, fusion: fuse.AttentionFusion, seen: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Maps and logits as `inspect` gives them, with gradient to head and fusion where it is asked for.

        seen: f32[b,gh,gw], 0 on padding, which then has no CAM; None: there is none.
        """
        b, _, gh, gw = looked.patches.shape
        looked.watch.fusion = fusion
        maps, class_logits = head(looked.patches).float(), self._class_logits(looked.tokens).float()
        with full_precision(maps):
            weights, coarse, cross = looked.watch.weigh(), maps.relu().flatten(2), looked.watch.cross()
            if seen is not None:
                coarse = coarse * seen.flatten(1)[:, None]
            planes = self._planes(coarse, cross)
            fine = looked.watch.spread(planes) if self.cam.patch_refine else planes
        named = {"coarse": coarse, "cross": cross, "fused": coarse * cross, "fine": fine}
        return {name: value.view(b, -1, gh, gw) for name, value in named.items()} | {
            "fusion_weights": fuse.by_layer_and_head(weights, self.backbone.depth),
            "cls_logits": class_logits,
            "coarse_logits": self._pooled(maps, None if seen is None else seen > 0),
        }

    def _patch_attention(self, watch: fuse.Kept | fuse.Recomputed, images: int, patches: int) -> Tensor:
        """f32[b,p,p]: row p holds what patch p looks at."""
        identity = torch.eye(patches, device=self.head.weight.device).expand(images, -1, -1)
        with full_precision(identity):
            return watch.spread(identity).transpose(1, 2)

    def _class_logits(self, tokens: Tensor) -> Tensor:
        if self.cam.class_head == "mean":
            return tokens.mean(dim=2)
        return (tokens * self.class_weight).sum(dim=2) + self.class_bias

    def _pooled(self, maps: Tensor, seen: Tensor | None) -> Tensor:
        return pooled(maps, seen, pool=self.cam.pool, topk_share=self.cam.topk_share)

    def _planes(self, coarse: Tensor, cross: Tensor) -> Tensor:
        """What patch attention refines: f32[b,c,p]."""
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
    kept = ("head.", FUSION)
    found = {
        name if name.startswith(kept) else f"backbone.net.{name}": value
        for name, value in tensors.items()
        if not name.startswith("norm.")
    }
    tokens = found.get("backbone.net.cls_token")
    if tokens is None or tokens.shape[1] != COCO_IDS:
        return found
    used, positions = [number - 1 for number in COCO_USED_IDS], found["backbone.net.pos_embed"]
    found["backbone.net.cls_token"] = tokens[:, used]
    found["backbone.net.pos_embed"] = torch.cat([positions[:, used], positions[:, COCO_IDS:]], dim=1)
    return found | {name: found[name][used] for name in ("head.weight", "head.bias") if name in found}


def check_alike(told: Mapping[str, str], params: CamParams, classes: Sequence[str], init: Path) -> None:
    """ValueError where a model.safetensors was trained with other params or classes than those it is now to be used with.

    told: the file's metadata, as stage train writes it; init: the file, for the error.
    """
    theirs = json.loads(told.get("section", "{}")).get("model", {})
    other = [name for name in TRAINED_WITH if name in theirs and theirs[name] != getattr(params, name)]
    if other:
        said = "; ".join(f"{name} {theirs[name]!r}, not {getattr(params, name)!r}" for name in other)
        raise ValueError(f"{init} was trained with {said}: set the same in train.<m>.model of params.yaml")
    known = json.loads(told.get("labels", "null"))
    if known is not None and known != list(classes):
        raise ValueError(f"{init} knows the classes {', '.join(known)}; the data set has {', '.join(classes)}")


def published(
    state_dict: Mapping[str, Any], attention_pool: Literal["max", "avg"]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The authors' weights, in a wrapper {"model": …} or not → the values of CamParams that they published, and the tensors in our
    names. Width, grid and number of classes are read off the tensors. ValueError lists the keys that miss."""
    given = renamed(weights.unwrapped(state_dict))
    needed = [
        "backbone.net.pos_embed", "backbone.net.cls_token", "head.weight", MARK, f"{FUSION}attn_feat_ffn.0.weight",
    ]  # fmt: skip
    absent = [name for name in needed if name not in given]
    if absent:
        raise ValueError(f"these are no weights of WeakTr's step 1: {', '.join(map(published_name, absent))} missing")
    positions, tokens, _, head_ffn, feature_ffn = (given[name] for name in needed)
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
    return values, given
