"""ViT encoder + mask-transformer decoder (Strudel et al. 2021; WeakTr section 2), trained on pseudo-masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import AboveZero, NonNegative, Positive, Range
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.nn.family import IMAGENET_MEAN, IMAGENET_STD
from pipeline.nn.vit.backbone import Backbone
from pipeline.nn.vit.bilinear_vit import HEAD_WIDTH, BilinearVit
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
    drop_path          stochastic depth of the encoder
    decoder_blocks, decoder_heads, decoder_dropout   of the mask transformer; heads must divide the encoder's channels
    encoder_lr_factor  learning rate of the encoder over the decoder's; 0 freezes the encoder
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


# WeakTr section 2.3, for from_official. Their poly schedule ends at a floor of 1e-5, ours at 0.
PUBLISHED_SCHEDULE = Schedule(
    epochs=100, batch_size=4, shards=1, lr=1e-4, weight_decay=0.0, optimiser="sgd", schedule="poly", warmup=0
)  # fmt: skip
PUBLISHED_CLIPPING = Clipping(start=1.2, cell=120)


class Segmenter(nn.Module):
    """family: pipeline.nn.vit.backbone."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if params.encoder_lr_factor == 0:
            self.backbone.requires_grad_(False)
        if self.backbone.dim % params.decoder_heads:
            raise ValueError(
                f"decoder_heads {params.decoder_heads} does not divide the {self.backbone.dim} channels of "
                f"{params.architecture} (edit retrain.<m>.model in params.yaml)"
            )
        self.decoder = MaskTransformer(
            len(labels) + 1,
            self.backbone.dim,
            blocks=params.decoder_blocks,
            heads=params.decoder_heads,
            dropout=params.decoder_dropout,
        )

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor]) -> Segmenter:
        """WeakTr's step-2 weights in its authors' names (encoder.*, decoder.*) → a segmenter with the published settings.

        Width, depth, patch size, position grid and the number of classes are read off the tensors; classes are named
        "class 1", "class 2", … since the file has no names. ValueError lists the keys that miss, are unknown, or do not fit.
        """
        given = {name: value for name, value in state_dict.items() if not name.startswith("encoder.head.")}  # an unused one
        needed = ("encoder.pos_embed", "encoder.patch_embed.proj.weight", "decoder.cls_emb")
        absent = [name for name in needed if name not in given]
        if absent:
            raise ValueError(f"these are no weights of WeakTr's segmenter: {', '.join(absent)} missing")
        dim, patch_size = given[needed[0]].shape[-1], given[needed[1]].shape[-1]
        grid, planes = round((given[needed[0]].shape[1] - 1) ** 0.5), given[needed[2]].shape[1]
        net = BilinearVit(grid=grid, patch_size=patch_size, dim=dim, depth=_depth(given, "encoder.blocks."))
        params = Params(
            architecture="vit of the file",
            image_size=grid * patch_size,
            drop_path=0.1,
            decoder_blocks=_depth(given, "decoder.blocks."),
            decoder_heads=max(1, dim // HEAD_WIDTH),
            decoder_dropout=0.1,
            encoder_lr_factor=0.1,
            balance="pixels",
            clipping=PUBLISHED_CLIPPING,
        )
        labels = LabelSpace(tuple(f"class {value}" for value in range(1, planes)))
        backbone = Backbone(net, IMAGENET_MEAN, IMAGENET_STD)
        made = cls(labels, params, PUBLISHED_SCHEDULE, SimpleNamespace(create=lambda *_, **__: backbone))
        own = {name.replace("backbone.net.", "encoder.", 1): value for name, value in made.state_dict().items()}
        problems = [f"{name} is missing" for name in own if name not in given]
        problems += [f"{name} is unknown" for name in given if name not in own]
        problems += [
            f"{name} has shape {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in given and given[name].shape != value.shape
        ]
        if problems:
            more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise ValueError(f"these are no weights of WeakTr's segmenter: {'; '.join(problems[:20])}{more}")
        made.load_state_dict({name.replace("encoder.", "backbone.net.", 1): value for name, value in given.items()})
        return made.eval()

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
        """f32[b,3,h,w] RGB in 0..1, any size → logits f32[b,c+1,h,w], plane 0 background.

        Padded right and bottom to the stride with what the network sees as 0 (weaktr.md section 2.1), and cut back.
        """
        h, w = images.shape[-2:]
        ph, pw = -h % self.backbone.stride, -w % self.backbone.stride
        padded = images
        if ph or pw:
            padded = self.backbone.normalise.mean.expand(len(images), 3, h + ph, w + pw).clone()
            padded[..., :h, :w] = images
        grid = self.decoder(self.backbone(padded))
        return F.interpolate(grid, (h + ph, w + pw), mode="bilinear", align_corners=False)[..., :h, :w]


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks whose keys start with prefix, at least 1."""
    numbers = [int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)]
    return 1 + max(numbers, default=0)


def balanced_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Half the mean over background pixels plus half the mean over foreground pixels (AFA section 3).

    logits f32[b,c,h,w], mask values [b,h,w]. A kind that is missing adds 0, where the authors' means are NaN.
    """
    pixel = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    background = labels == BACKGROUND
    foreground = ~background & (labels != IGNORE)
    means = [(pixel * kind).sum() / kind.sum().clamp(min=1) for kind in (background, foreground)]
    return 0.5 * means[0] + 0.5 * means[1]


def clipped_cross_entropy(logits: Tensor, labels: Tensor, *, start: float, cell: int) -> Tensor:
    """WeakTr section 2.2: logits f32[b,c,h,w], mask values [b,h,w] → mean over all pixels; ignored ones count as 0.

    Once the mean loss is at most `start`, each pixel's loss is cut at max(mean of its cell over the batch, global mean):
    pixels above it give a constant and no gradient. Cells are squares of `cell` px, narrower at the right and lower border
    (the authors pad there, which is the same wherever `cell` divides the sides, as in their crops).
    """
    pixel = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    h, w = pixel.shape[-2:]
    with torch.no_grad():
        mean = pixel.mean()
        cells = F.avg_pool2d(pixel.mean(dim=0)[None, None], cell, ceil_mode=True, count_include_pad=False)
        limit = torch.maximum(cells, mean).repeat_interleave(cell, -2).repeat_interleave(cell, -1)[0, :, :h, :w]
        limit = torch.where(mean > start, torch.inf, limit)  # decided on the device: an `if` would wait for it each step
    return torch.where(pixel > limit, limit, pixel).mean()
