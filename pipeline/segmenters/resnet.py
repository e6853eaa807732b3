"""ResNet + DeepLab's head of version 2 or 3+ (Chen et al. 2017, 2018), trained on pseudo-masks: the field's usual last step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import NonNegative, Positive, Range
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.labels import LabelSpace
from pipeline.nn.family import load_whole, pad_to_stride
from pipeline.nn.resnet.deeplab_head import GROUPS, DeepLabV2, DeepLabV3Plus
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, mean_cross_entropy
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """retrain.<m>.model.

    architecture       a ResNet of timm (resnet101@8: at stride 8 instead of 16), resnet38d or scenes_resnet
    image_size         px; a ResNet has no position embeddings, so it does not matter
    drop_path          stochastic depth of the encoder
    head               deeplab_v2: convolutions to the classes, summed; deeplab_v3plus: pyramid and decoder, at stride 4
    dilations          cells of the last map between the taps of the head's 3×3 convolutions, one for each; published: 6, 12, 18, 24
                       at stride 8 (v2), 6, 12, 18 at stride 16 (v3+)
    width, low_width   v3+ only: channels of its layers, and of the fine map; published 256 and 48; multiples of 8
    dropout            v3+ only: of whole channels before the last layer
    encoder_lr_factor  learning rate of the encoder over the head's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from each
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Range(low=0, high=0.9)]
    head: Literal["deeplab_v2", "deeplab_v3plus"]
    dilations: tuple[Positive, ...]
    width: Positive
    low_width: Positive
    dropout: Annotated[float, Range(low=0, high=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]

    def __post_init__(self) -> None:
        if not self.dilations:
            raise ValueError("dilations is empty; it needs at least one")
        if self.width % GROUPS or self.low_width % GROUPS:
            raise ValueError(f"width {self.width} and low_width {self.low_width} must be multiples of {GROUPS}")


@dataclass(frozen=True)
class Options:
    """segment.<m>.options: none."""


class Segmenter(nn.Module):
    """family: pipeline.nn.resnet.backbone. Its batch norms keep their statistics."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if params.encoder_lr_factor == 0:
            self.backbone.requires_grad_(False)
        if params.head == "deeplab_v2":
            self.decoder: nn.Module = DeepLabV2(self.backbone.dims, len(labels) + 1, dilations=params.dilations)
        else:
            self.decoder = DeepLabV3Plus(
                self.backbone.dims,
                len(labels) + 1,
                dilations=params.dilations,
                width=params.width,
                low_width=params.low_width,
                dropout=params.dropout,
            )

    def load_initial(self, family: Any, init: Path) -> None:
        """The encoder's weights, or those of a whole segmenter.safetensors of ours."""
        mark = next(name for name in self.state_dict() if name.startswith("decoder."))
        if not load_whole(self, init, mark):
            family.load_initial(self.backbone, init)

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("segment")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        return decayed(self.decoder.parameters(), 1.0) + decayed(self.backbone.parameters(), self.params.encoder_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy against pseudo-masks; 255, which padding is too, does not count."""
        del clock
        assert batch.masks is not None  # the loop was given pseudo-masks
        balanced = self.params.balance == "background_foreground"
        loss = (balanced_cross_entropy if balanced else mean_cross_entropy)(self._logits(batch.images).float(), batch.masks)
        return {"segmentation": loss}

    def segment(self, images: Tensor, options: Options) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, any size → logits f32[b,c+1,h,w], plane 0 background."""
        del options
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        padded = pad_to_stride(images, self.backbone)
        grid = self.decoder(self.backbone.feature_maps(padded))
        return F.interpolate(grid, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]
