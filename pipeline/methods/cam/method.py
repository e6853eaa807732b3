"""Plain CAM: a linear classifier on patch features, whose map before pooling is the score map (docs/methods/cam.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import LabelSpace
from pipeline.imaging.pooling import Pool, pooled, valid_cells
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """train.model.

    architecture        a network of the backbone family: timm's name, or the demo's own (scenes_vit, scenes_mit,
                        scenes_resnet)
    image_size          px; a ViT's position embeddings are made for this side, usually augment.size
    pool                class map → logit: gap mean of all cells, gmp maximum, topk mean of the highest topk_share
    topk_share          fraction of the cells, at least one cell; only topk uses it
    backbone_lr_factor  learning rate of the backbone over the head's; 0 freezes it
    drop_path           largest rate of stochastic depth, 0..0.9
    """

    architecture: str
    image_size: Positive
    pool: Pool
    topk_share: Annotated[float, Field(gt=0, le=1)]
    backbone_lr_factor: NonNegative
    drop_path: Annotated[float, Field(ge=0, le=0.9)]


@dataclass(frozen=True)
class Options:
    """extract.options: plain CAM has none."""


class Method(nn.Module):
    """family: the module `backbone` of a folder of pipeline/nn (create, load_initial)."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.stride: int = self.backbone.stride
        self.head = nn.Conv2d(self.backbone.dim, len(labels), 1, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        if params.backbone_lr_factor == 0:
            self.backbone.requires_grad_(False)

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; the head starts at random."""
        family.load_initial(self.backbone, init)

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("classify")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        return decayed(self.head.parameters(), 1.0) + decayed(self.backbone.parameters(), self.params.backbone_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Multi-label soft margin (IRN, PSA) on the pooled class map; padding takes no part in the pooling."""
        del clock
        maps = self._class_map(batch.images)
        valid = valid_cells(batch.valid, (maps.shape[-2], maps.shape[-1]))
        return {"classification": F.multilabel_soft_margin_loss(self._pooled(maps, valid), batch.tags)}

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """CAM_c = ReLU(w_c · f) (Zhou et al. 2016, eq. 2, with the ReLU of PSA). Shapes as in contracts.ScoreMaps."""
        del options, keep_affinity  # plain CAM has neither
        maps = self._class_map(images).float()
        return ScoreMaps(maps.relu(), None, self._pooled(maps, None))

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """class_map f32[b,c,gh,gw] before the ReLU, logits f32[b,c]."""
        maps = self._class_map(images).float()
        return {"class_map": maps, "logits": self._pooled(maps, None)}

    def _class_map(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] in 0..1 → S_c = w_c · f, f32[b,c,gh,gw]."""
        if self.params.backbone_lr_factor == 0:
            with torch.no_grad():
                features = self.backbone(images)
        else:
            features = self.backbone(images)
        return self.head(features)

    def _pooled(self, maps: Tensor, valid: Tensor | None) -> Tensor:
        return pooled(maps, valid, pool=self.params.pool, topk_share=self.params.topk_share)
