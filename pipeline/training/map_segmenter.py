"""Backbone + decoder of feature maps → a segmenter; segmenters/mit and segmenters/resnet bring the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.nn.weights import load_whole, pad_to_stride
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, mean_cross_entropy
from pipeline.training.settings import Schedule


class MapSegmenter(nn.Module):
    """Trainable. decoder: feature maps, finest first → f32[b,c+1,·,·]; its learning rate is the schedule's.

    encoder_lr_factor: learning rate of the backbone over the decoder's; 0 freezes it.
    balanced: half the loss from background, half from the rest (AFA section 3); else every pixel weighs the same.
    """

    def __init__(
        self, backbone: Any, decoder: nn.Module, schedule: Schedule, *, encoder_lr_factor: float, balanced: bool
    ) -> None:
        super().__init__()
        self.backbone, self.decoder, self.schedule = backbone, decoder, schedule
        self.encoder_lr_factor, self.balanced = encoder_lr_factor, balanced
        if encoder_lr_factor == 0:
            self.backbone.requires_grad_(False)

    def load_initial(self, family: Any, init: Path) -> None:
        """Loads the encoder's weights, or a segmenter.safetensors of this pipeline."""
        mark = next(name for name in self.state_dict() if name.startswith("decoder."))
        if not load_whole(self, init, mark):
            family.load_initial(self.backbone, init)

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("segment")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        return decayed(self.decoder.parameters(), 1.0) + decayed(self.backbone.parameters(), self.encoder_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy against pseudo-masks; 255, which padding is too, does not count."""
        del clock
        assert batch.masks is not None  # the loop was given pseudo-masks
        loss = balanced_cross_entropy if self.balanced else mean_cross_entropy
        return {"segmentation": loss(self._logits(batch.images).float(), batch.masks)}

    def segment(self, images: Tensor, options: Any) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, any size → logits f32[b,c+1,h,w], plane 0 background."""
        del options
        return self._logits(images)

    def _logits(self, images: Tensor) -> Tensor:
        h, w = images.shape[-2:]
        padded = pad_to_stride(images, self.backbone)
        grid = self.decoder(self.backbone.feature_maps(padded))
        return F.interpolate(grid, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w]
