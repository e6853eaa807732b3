"""ViT encoder + mask-transformer decoder (Strudel et al. 2021; WeakTr section 2), trained on pseudo-masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import AboveZero, NonNegative, Positive, Range
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.nn.vit.mask_transformer import MaskTransformer
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Clipping:
    """WeakTr's gradient clipping: below a mean loss of `start`, pixels that lose more than their cell's mean stop learning.

    cell: px of the square cells.
    """

    start: AboveZero
    cell: Positive


@dataclass(frozen=True)
class Params:
    """retrain.<m>.model.

    architecture       the encoder: a timm ViT or scenes_vit
    image_size         px; grid of the position embeddings, usually augment.size
    decoder_blocks, decoder_heads, decoder_dropout   of the mask transformer
    encoder_lr_factor  learning rate of the encoder over the decoder's
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from each (AFA section 3)
    clipping           null, or WeakTr's rule
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Range(low=0, high=0.9)]
    decoder_blocks: Positive
    decoder_heads: Positive
    decoder_dropout: Annotated[float, Range(low=0, high=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]
    clipping: Clipping | None

    def __post_init__(self) -> None:
        if self.clipping is not None and self.balance != "pixels":
            raise ValueError("clipping works on the plain loss: set balance to pixels, or clipping to null")


class Segmenter(nn.Module):
    """family: pipeline.nn.vit.backbone."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.decoder = MaskTransformer(
            len(labels) + 1,
            self.backbone.dim,
            blocks=params.decoder_blocks,
            heads=params.decoder_heads,
            dropout=params.decoder_dropout,
        )

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("segment")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        groups = []
        for part, factor in ((self.decoder, 1.0), (self.backbone, self.params.encoder_lr_factor)):
            if factor > 0:
                groups.append(ParamGroup([p for p in part.parameters() if p.ndim > 1], factor, 1.0))
                groups.append(ParamGroup([p for p in part.parameters() if p.ndim <= 1], factor, 0.0))
        return groups

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy against pseudo-masks; 255, which padding is too, does not count."""
        del clock
        assert batch.masks is not None  # the loop was given pseudo-masks
        logits, labels = self.segment(batch.images).float(), batch.masks.long()
        if self.params.clipping is not None:
            loss = clipped_cross_entropy(logits, labels, start=self.params.clipping.start, cell=self.params.clipping.cell)
        elif self.params.balance == "background_foreground":
            loss = balanced_cross_entropy(logits, labels)
        else:
            counted = (labels != IGNORE).sum().clamp(min=1)
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") / counted
        return {"segmentation": loss}

    def segment(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, any size → logits f32[b,c+1,h,w]; padded right and bottom to the stride, and cut back."""
        h, w = images.shape[-2:]
        stride = self.backbone.stride
        ph, pw = -h % stride, -w % stride
        padded = F.pad(images, (0, pw, 0, ph), mode="replicate") if ph or pw else images
        grid = self.decoder(self.backbone(padded))
        return F.interpolate(grid, (h + ph, w + pw), mode="bilinear", align_corners=False)[..., :h, :w]


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the mean over background pixels plus half the mean over foreground pixels (AFA section 3); no NaN where one is missing."""
    pixel = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    background = labels == BACKGROUND
    foreground = ~background & (labels != IGNORE)
    means = [(pixel * kind).sum() / kind.sum().clamp(min=1) for kind in (background, foreground)]
    return 0.5 * means[0] + 0.5 * means[1]


def clipped_cross_entropy(logits: Tensor, labels: Tensor, *, start: float, cell: int) -> Tensor:
    """WeakTr section 2.2: logits f32[b,c,h,w], labels i64[b,h,w] → mean over all pixels (ignored ones count as 0).

    Once the mean loss is at most `start`, each pixel's loss is cut at max(mean of its cell over the batch, global mean): pixels
    above it give a constant and no gradient. Cells are squares of `cell` px; at the right and lower border they are narrower.
    """
    pixel = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    mean = pixel.mean()
    if mean.detach() > start:
        return mean
    h, w = pixel.shape[-2:]
    with torch.no_grad():
        cells = F.avg_pool2d(pixel.mean(dim=0)[None, None], cell, ceil_mode=True, count_include_pad=False)
        limit = torch.maximum(cells, mean).repeat_interleave(cell, -2).repeat_interleave(cell, -1)[0, :, :h, :w]
    return torch.minimum(pixel, limit).mean()
