"""ResNet + DeepLab's head of version 2 or 3+ (Chen et al. 2017, 2018), trained on pseudo-masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from pipeline.core.config import NonNegative, Positive
from pipeline.core.labels import LabelSpace
from pipeline.segmenters.resnet.deeplab_head import GROUPS, DeepLabV2, DeepLabV3Plus
from pipeline.training.map_segmenter import MapSegmenter
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """retrain.model.

    architecture       a ResNet of timm (resnet101@8: at stride 8 instead of 16), resnet38d or scenes_resnet
    image_size         px; a ResNet has no position embeddings, so it is not used
    drop_path          largest rate of stochastic depth of the encoder, 0..0.9
    head               deeplab_v2: convolutions to the classes, summed; deeplab_v3plus: pyramid and decoder, at stride 4
    dilations          of the head's 3×3 convolutions, in cells of the last map, one per convolution; published: 6, 12, 18,
                       24 at stride 8 (v2), 6, 12, 18 at stride 16 (v3+)
    width              v3+ only: channels of its layers, a multiple of 8; published: 256
    low_width          v3+ only: channels of the map at stride 4, a multiple of 8; published: 48
    dropout            v3+ only: of whole channels before the last layer
    encoder_lr_factor  learning rate of the encoder over the head's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from background, half from
                       the rest
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    head: Literal["deeplab_v2", "deeplab_v3plus"]
    dilations: tuple[Positive, ...]
    width: Positive
    low_width: Positive
    dropout: Annotated[float, Field(ge=0, le=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]

    def __post_init__(self) -> None:
        if not self.dilations:
            raise ValueError("dilations is empty; it needs at least one")
        if self.width % GROUPS or self.low_width % GROUPS:
            raise ValueError(f"width {self.width} and low_width {self.low_width} must be multiples of {GROUPS}")


@dataclass(frozen=True)
class Options:
    """segment.options: none."""


class Segmenter(MapSegmenter):
    """family: pipeline.nn.resnet.backbone. Its batch norms keep their statistics."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if params.head == "deeplab_v2":
            decoder: nn.Module = DeepLabV2(backbone.dims, len(labels) + 1, dilations=params.dilations)
        else:
            decoder = DeepLabV3Plus(
                backbone.dims,
                len(labels) + 1,
                dilations=params.dilations,
                width=params.width,
                low_width=params.low_width,
                dropout=params.dropout,
            )
        balanced = params.balance == "background_foreground"
        super().__init__(backbone, decoder, schedule, encoder_lr_factor=params.encoder_lr_factor, balanced=balanced)
