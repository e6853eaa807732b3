"""Mix Transformer + SegFormer's head (Xie et al. 2021), trained on pseudo-masks: the network of AFA's decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.config import NonNegative, Positive
from pipeline.core.labels import LabelSpace
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.map_segmenter import MapSegmenter
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """retrain.model.

    architecture       mit_b0 … mit_b5, or scenes_mit
    image_size         px; a MiT has no position embeddings, so it is not used
    drop_path          largest rate of stochastic depth of the encoder, 0..0.9
    decoder_width      channels of the head; SegFormer has 256 for B0 and B1, 768 above
    decoder_dropout    of whole channels before the last layer
    encoder_lr_factor  learning rate of the encoder over the head's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from background, half from
                       the rest (AFA section 3)
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    decoder_width: Positive
    decoder_dropout: Annotated[float, Field(ge=0, le=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]


@dataclass(frozen=True)
class Options:
    """segment.options: none."""


class Segmenter(MapSegmenter):
    """family: pipeline.nn.mit.backbone."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        decoder = SegFormerHead(backbone.dims, len(labels) + 1, width=params.decoder_width, dropout=params.decoder_dropout)
        balanced = params.balance == "background_foreground"
        super().__init__(backbone, decoder, schedule, encoder_lr_factor=params.encoder_lr_factor, balanced=balanced)
