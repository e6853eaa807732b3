"""Mix Transformer + SegFormer's head (Xie et al. 2021), trained on pseudo-masks: AFA's own network, retrained in kind."""

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
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, mean_cross_entropy
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Params:
    """retrain.<m>.model.

    architecture       mit_b0 … mit_b5, or scenes_mit
    image_size         px; a MiT has no position embeddings, so it does not matter
    drop_path          stochastic depth of the encoder
    decoder_width      channels of the head; SegFormer has 256 for B0 and B1, 768 above
    decoder_dropout    of whole channels before the last layer
    encoder_lr_factor  learning rate of the encoder over the head's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from each (AFA section 3)
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Range(low=0, high=0.9)]
    decoder_width: Positive
    decoder_dropout: Annotated[float, Range(low=0, high=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]


@dataclass(frozen=True)
class Options:
    """segment.<m>.options: none."""


class Segmenter(nn.Module):
    """family: pipeline.nn.mit.backbone."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if params.encoder_lr_factor == 0:
            self.backbone.requires_grad_(False)
        self.decoder = SegFormerHead(
            self.backbone.dims, len(labels) + 1, width=params.decoder_width, dropout=params.decoder_dropout
        )

    def load_initial(self, family: Any, init: Path) -> None:
        """The encoder's weights, or those of a whole segmenter.safetensors of ours."""
        if not load_whole(self, init, "decoder.linear_c1.proj.weight"):
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
        grid = self.decoder(self.backbone.stages(padded)[0])
        return F.interpolate(grid, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]
