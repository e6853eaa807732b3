"""Any decoder × any encoder of segmentation_models_pytorch (Iakubovskii 2019), trained on pseudo-masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import NonNegative
from pipeline.core.labels import LabelSpace
from pipeline.nn.smp import backbone as smp
from pipeline.training.map_segmenter import MapSegmenter
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """retrain.model. Needs `pip install 'tag2mask[smp]'`.

    decoder            the package's architecture
    encoder            the package's name of the encoder (resnet18, mit_b0), or any convolutional network of timm, as
                       tu-tf_efficientnet_lite0
    depth              halvings of the image in the encoder; 5 mostly, 3 for pspnet
    norm               of the encoder: frozen: batch norms keep their pre-trained statistics; group: group norms stand in
                       their place, as random initial weights need. The decoder's are group norms, always
    decoder_options    arguments of the package's class, such as decoder_channels; what is absent has the package's value
    encoder_lr_factor  learning rate of the encoder over the decoder's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from background, half from
                       the rest
    """

    decoder: Literal[
        "unet", "unetplusplus", "manet", "linknet", "fpn", "pspnet", "deeplabv3", "deeplabv3plus", "upernet", "segformer",
    ]  # fmt: skip
    encoder: str
    depth: Annotated[int, Field(ge=3, le=5)]
    norm: Literal["frozen", "group"]
    decoder_options: dict[str, Any]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]

    def __post_init__(self) -> None:
        smp.check(self.decoder, self.encoder, self.depth, self.decoder_options)


@dataclass(frozen=True)
class Options:
    """segment.options: none."""


class Decoder(nn.Module):
    """Feature maps, finest first → logits f32[b,c+1,·,·]: the package's decoder and its last layer."""

    def __init__(self, net: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.net, self.head = smp.grouped(net), head

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.head(self.net(features))


class Segmenter(MapSegmenter):
    """family: pipeline.nn.smp.backbone. No norm sees another image of the batch."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        network = family.network(params.decoder, params.encoder, params.depth, len(labels) + 1, params.decoder_options)
        encoder = family.grouped(network.encoder) if params.norm == "group" else network.encoder
        super().__init__(
            family.Backbone(encoder, params.encoder),
            Decoder(network.decoder, network.segmentation_head),
            schedule,
            encoder_lr_factor=params.encoder_lr_factor,
            balanced=params.balance == "background_foreground",
        )
