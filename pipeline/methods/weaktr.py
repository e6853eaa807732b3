"""WeakTr, step 1: class tokens' attention × CAM, refined by patch attention, heads weighted by a learned fusion.

docs/methods/weaktr.md says what is published and what is ours. Step 2 is segmenters/vit.py.
Shape letters: b images, c classes, p = gh * gw patches, k = heads * layers attention maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import NonNegative, Positive, Range
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import LabelSpace
from pipeline.imaging.pooling import Pool, pooled
from pipeline.nn import family as weights_file
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import fusion as fuse
from pipeline.nn.vit.class_tokens import ClassTokenVit
from pipeline.nn.vit.coco_ids import COCO_UNUSED_IDS, COCO_USED_IDS
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """train.<m>.model.

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
    backbone_lr_factor  learning rate of the backbone over that of class tokens, heads and fusion
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Range(low=0, high=0.9)]
    features: Literal["residual", "normed"]
    token_weight: Literal["each", "one"]
    attention: Literal["fused", "cross", "patch"]
    patch_refine: bool
    pool: Pool
    topk_share: Annotated[float, Range(above=0, high=1)]
    attention_pool: Literal["max", "avg"]
    reduction: Positive
    feature_reduction: Positive
    class_head: Literal["mean", "linear"]
    patch_head: Literal["conv3", "conv1"]
    backbone_lr_factor: NonNegative


@dataclass(frozen=True)
class Options:
    """extract.<m>.options: WeakTr has none."""


# The paper's step 1 (weaktr.md section 1.5), for from_official: lr 6e-4 · 64 / 512, floor 1e-5
PUBLISHED_SCHEDULE = Schedule(
    epochs=60, batch_size=64, shards=1, lr=7.5e-5, lr_floor=0.13, weight_decay=0.03, optimiser="adamw", schedule="cosine",
    warmup=825,
)  # fmt: skip
PUBLISHED_PATCH = 16
PUBLISHED_SIZES = {192: "deit_tiny_patch16_224", 384: "deit_small_patch16_224", 768: "deit_base_patch16_224"}
COCO_IDS = len(COCO_USED_IDS) + len(COCO_UNUSED_IDS)
KERNELS = {"conv3": 3, "conv1": 1}


class Method(nn.Module):
    """family: pipeline.nn.vit.backbone."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        plain = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.backbone = ClassTokenVit(plain, len(labels), params.features, params.token_weight)
        self.stride: int = self.backbone.stride
        dim, kernel = self.backbone.dim, KERNELS[params.patch_head]
        self.head = nn.Conv2d(dim, len(labels), kernel, padding=kernel // 2)
        if params.class_head == "linear":
            self.class_weight = nn.Parameter(torch.full((len(labels), dim), 1 / dim))  # starts as the mean
            self.class_bias = nn.Parameter(torch.zeros(len(labels)))
        self.adaptive_attention_fusion = fuse.AttentionFusion(
            dim,
            self.backbone.heads,
            self.backbone.depth,
            reduction=params.reduction,
            feature_reduction=params.feature_reduction,
            pool=params.attention_pool,
        )
        self._room = fuse.Room()

    def load_initial(self, family: Any, init: Path) -> None:
        """A plain ViT's weights, a model.safetensors of this method, or the authors' checkpoint (train it for 0 epochs to
        use it as it is)."""
        del family
        mark = "adaptive_attention_fusion.attn_head_ffn.0.weight"
        if not weights_file.load_whole(self, init, mark, renamed, published_name):
            self.backbone.load_initial(init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """The authors' step-1 weights → a method with the published settings; a wrapper {"model": …} is opened.

        Width, grid and number of classes are read off the tensors. The 90 ids of COCO become its 80 classes: the tokens of the
        ten unused ids leave the sequence. ValueError lists the keys that miss, are unknown, or do not fit.
        """
        given = renamed(weights_file.unwrapped(state_dict))
        needed = [
            "backbone.net.pos_embed", "backbone.net.cls_token", "head.weight",
            "adaptive_attention_fusion.attn_head_ffn.0.weight", "adaptive_attention_fusion.attn_feat_ffn.0.weight",
        ]  # fmt: skip
        absent = [name for name in needed if name not in given]
        if absent:
            raise ValueError(f"these are no weights of WeakTr's step 1: {', '.join(map(published_name, absent))} missing")
        positions, tokens, head, head_ffn, feature_ffn = (given[name] for name in needed)
        classes, dim = tokens.shape[1:]
        if dim not in PUBLISHED_SIZES:
            raise ValueError(f"there is no published backbone with {dim} channels; known are {PUBLISHED_SIZES}")
        params = Params(
            architecture=PUBLISHED_SIZES[dim],
            image_size=PUBLISHED_PATCH * round((positions.shape[1] - classes) ** 0.5),
            drop_path=0.1,
            features="residual",
            token_weight="each",
            attention="fused",
            patch_refine=True,
            pool="gap",
            topk_share=1.0,
            attention_pool="max",
            reduction=max(1, head_ffn.shape[1] // head_ffn.shape[0]),
            feature_reduction=max(1, feature_ffn.shape[1] // feature_ffn.shape[0]),
            class_head="mean",
            patch_head="conv3",
            backbone_lr_factor=1.0,
        )
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(head) + 1)))
        made = cls(labels, params, PUBLISHED_SCHEDULE, vit)
        weights_file.load_exactly(made, given, "this state dict", spoken=published_name)
        return made.eval()

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("classify")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        """Class tokens learn as fast as the heads: they start all alike, and at a fine-tuning rate stay so for long."""
        backbone = {id(parameter) for parameter in self.backbone.parameters()} - {id(self.backbone.net.cls_token)}
        fine_tuned = [p for p in self.parameters() if id(p) in backbone]
        new = [p for p in self.parameters() if id(p) not in backbone]
        return decayed(new, 1.0) + decayed(fine_tuned, self.params.backbone_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Three multi-label soft margins of weight 1: class tokens, coarse CAM, fine CAM (section 1.4).

        The fine one trains the fusion alone, the other two train backbone and heads. Padding takes no part in the means.
        """
        del clock
        grid = batch.images.shape[-2] // self.stride, batch.images.shape[-1] // self.stride
        seen = F.adaptive_max_pool2d(batch.valid[:, None].float(), grid)[:, 0]
        share = seen.flatten(1) / seen.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)
        sketch = fuse.Sketch(self.adaptive_attention_fusion, self.backbone.classes, share)
        tokens, patches = self.backbone(batch.images, sketch)
        maps = self.head(patches).float()
        with full_precision(maps):
            cross, mean_row = sketch.fused()
        planes = self._planes(maps.detach().relu().flatten(2) * seen.flatten(1)[:, None], cross)
        logits = {
            "class_tokens": self._class_logits(tokens),
            "coarse": self._pooled(maps, seen > 0),
            "fine": (planes * (mean_row if self.params.patch_refine else share[:, None])).sum(dim=2),
        }
        return {name: F.multilabel_soft_margin_loss(value.float(), batch.tags) for name, value in logits.items()}

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """The fine CAM. Shapes as in contracts.ScoreMaps; tag logits are the mean of those of class tokens and coarse CAM; the
        affinity is the fused patch attention, made symmetric."""
        del options
        patches = images.shape[-2] * images.shape[-1] // self.stride**2
        each = fuse.bytes_of_maps(self.adaptive_attention_fusion, self.backbone.prefix + patches)
        together = max(1, fuse.TOGETHER_BYTES // each)
        found: dict[str, list[Tensor]] = {"fine": [], "coarse_logits": [], "cls_logits": [], "affinity": []}
        for at in range(0, len(images), together):
            part, watch = self._watched(images[at : at + together], patches)
            if keep_affinity:
                attention = self._patch_attention(watch, len(part["fine"]), patches)
                part["affinity"] = (attention + attention.transpose(1, 2)) / 2
            for name, parts in found.items():
                parts += [part[name]] if name in part else []
        logits = (torch.cat(found["coarse_logits"]) + torch.cat(found["cls_logits"])) / 2
        return ScoreMaps(torch.cat(found["fine"]), torch.cat(found["affinity"]) if keep_affinity else None, logits)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """Maps f32[b,c,gh,gw]: coarse (CAM), cross (fused cross attention), fused (their product), fine; logits f32[b,c]:
        cls_logits, coarse_logits, fine_logits; fusion_weights f32[b,layers,heads]; patch_attention f32[b,p,p]."""
        patches = images.shape[-2] * images.shape[-1] // self.stride**2
        found, watch = self._watched(images, patches)
        attention = self._patch_attention(watch, len(images), patches)
        return found | {"fine_logits": found["fine"].mean(dim=(2, 3)), "patch_attention": attention}

    def _patch_attention(self, watch: fuse.Kept | fuse.Recomputed, images: int, patches: int) -> Tensor:
        """f32[b,p,p]: row p holds what patch p looks at."""
        identity = torch.eye(patches, device=self.head.weight.device).expand(images, -1, -1)
        with full_precision(identity):
            return watch.spread(identity).transpose(1, 2)

    def _watched(self, images: Tensor, patches: int) -> tuple[dict[str, Tensor], fuse.Kept | fuse.Recomputed]:
        b, grid = len(images), (images.shape[-2] // self.stride, images.shape[-1] // self.stride)
        watch = fuse.watch_for(
            self.adaptive_attention_fusion, self.backbone.classes, self.backbone.prefix + patches, patches, self._room
        )
        tokens, features = self.backbone(images, watch)
        maps, class_logits = self.head(features).float(), self._class_logits(tokens).float()
        with full_precision(images):
            weights, coarse, cross = watch.weigh(), maps.relu().flatten(2), watch.cross()
            planes = self._planes(coarse, cross)
            fine = watch.spread(planes) if self.params.patch_refine else planes
        named = {"coarse": coarse, "cross": cross, "fused": coarse * cross, "fine": fine}
        return {name: value.view(b, -1, *grid) for name, value in named.items()} | {
            "fusion_weights": fuse.by_layer_and_head(weights, self.backbone.depth),
            "cls_logits": class_logits,
            "coarse_logits": self._pooled(maps, None),
        }, watch

    def _class_logits(self, tokens: Tensor) -> Tensor:
        if self.params.class_head == "mean":
            return tokens.mean(dim=2)
        return (tokens * self.class_weight).sum(dim=2) + self.class_bias

    def _pooled(self, maps: Tensor, seen: Tensor | None) -> Tensor:
        return pooled(maps, seen, pool=self.params.pool, topk_share=self.params.topk_share)

    def _planes(self, coarse: Tensor, cross: Tensor) -> Tensor:
        """What patch attention refines: f32[b,c,p]."""
        if self.params.attention == "patch":
            return coarse
        return cross if self.params.attention == "cross" else cross * coarse


def full_precision(like: Tensor) -> torch.autocast:
    """No autocast: fused maps have values around 1 / n², which half precision would round to nothing."""
    return torch.autocast(like.device.type, enabled=False)


def published_name(name: str) -> str:
    """Our key name → the authors'."""
    return name.removeprefix("backbone.net.")


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours; COCO's 90 ids → 80 classes; the final norm, which nobody applies, is dropped."""
    kept = ("head.", "adaptive_attention_fusion.")
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
