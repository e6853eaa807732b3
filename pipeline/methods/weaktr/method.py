"""WeakTr, step 1: class tokens' attention × CAM, refined by patch attention, heads weighted by a learned fusion.

docs/methods/weaktr.md says what is published and what is ours. The network is nn/vit/cam_network.py; step 2 is
segmenters/vit. Shape letters: b images, c classes, p = gh * gw patches, k = heads * layers attention maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pipeline.core.config import NonNegative
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.labels import LabelSpace
from pipeline.nn import weights
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import cam_network as network
from pipeline.nn.vit.fusion import AttentionRows
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule

HAS_AFFINITY = True


@dataclass(frozen=True)
class Params(network.CamParams):
    """train.model: the network's params, and

    backbone_lr_factor  learning rate of the backbone over that of class tokens, heads and fusion
    """

    backbone_lr_factor: NonNegative


@dataclass(frozen=True)
class Options:
    """extract.options: WeakTr has none."""


# The paper's step 1 (weaktr.md section 1.5), for from_official: lr 6e-4 · 64 / 512, floor 1e-5
PUBLISHED_SCHEDULE = Schedule(
    epochs=60, min_steps=0, batch_size=64, shards=1, lr=7.5e-5, lr_floor=0.13, weight_decay=0.03, optimiser="adamw",
    schedule="cosine",
    warmup=825,
)  # fmt: skip


class Method(network.CamNetwork):
    """family: pipeline.nn.vit.backbone. `score_maps` and `inspect` are the network's."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__(len(labels), params, family)
        self.params, self.schedule = params, schedule

    def load_initial(self, family: Any, init: Path) -> None:
        """A plain ViT's weights, a model.safetensors of this method, or the authors' checkpoint (train it for 0 epochs to
        use it as it is)."""
        del family
        if not weights.load_whole(self, init, network.NETWORK_KEY, network.renamed, network.published_name):
            self.backbone.load_initial(init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """The authors' step-1 weights → a method with the published settings; a wrapper {"model": …} is opened.

        Width, grid and number of classes are read off the tensors. The 90 ids of COCO become its 80 classes: the tokens of
        the ten unused ids leave the sequence. ValueError lists the keys that miss, are unknown, or do not fit.
        """
        values, tensors = network.published(state_dict, attention_pool="max")
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(tensors["head.weight"]) + 1)))
        method = cls(labels, Params(**values, backbone_lr_factor=1.0), PUBLISHED_SCHEDULE, vit)
        weights.load_exactly(method, tensors, "this state dict", spoken=network.published_name)
        return method.eval()

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("classify")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        """Class tokens learn at the heads' rate: they all start as the same token, and at a fine-tuning rate would stay
        alike for long."""
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
        valid = F.adaptive_max_pool2d(batch.valid[:, None].float(), grid)[:, 0]
        patch_weights = valid.flatten(1) / valid.flatten(1).sum(dim=1, keepdim=True).clamp(min=1)
        rows = AttentionRows(self.adaptive_attention_fusion, self.backbone.classes, patch_weights)
        tokens, patches = self.backbone(batch.images, rows)
        maps = self.head(patches).float()
        with network.full_precision(maps):
            cross, mean_row = rows.fused()
        planes = self._planes(maps.detach().relu().flatten(2) * valid.flatten(1)[:, None], cross)
        logits = {
            "class_tokens": self._class_logits(tokens),
            "coarse": self._pooled(maps, valid > 0),
            "fine": (planes * (mean_row if self.params.patch_refine else patch_weights[:, None])).sum(dim=2),
        }
        return {name: F.multilabel_soft_margin_loss(value.float(), batch.tags) for name, value in logits.items()}
