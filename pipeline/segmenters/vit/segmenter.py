"""ViT encoder + mask-transformer decoder (Strudel et al. 2021; WeakTr section 2), trained on pseudo-masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import AboveZero, NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit.bilinear_vit import PATCH, WIDTHS
from pipeline.nn.vit.coco_ids import COCO_UNUSED_IDS, COCO_USED_IDS
from pipeline.nn.weights import load_exactly, load_whole, pad_to_stride, unwrapped
from pipeline.segmenters.vit.mask_transformer import MaskTransformer
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, mean_cross_entropy
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Clipping:
    """WeakTr's gradient clipping: pixels whose loss exceeds the mean of their cell get no gradient (clipped_cross_entropy).

    start  mean loss from which downwards pixels are clipped
    cell   px, side of the square cells
    """

    start: AboveZero
    cell: Positive


@dataclass(frozen=True)
class Params:
    """retrain.model.

    architecture       the encoder: a timm ViT or scenes_vit
    image_size         px; position embeddings are made for this side, usually augment.size
    drop_path          largest rate of stochastic depth of the encoder, 0..0.9
    decoder_blocks     blocks of the mask transformer
    decoder_heads      attention heads of its blocks; must divide the encoder's channels
    decoder_dropout    dropout rate of its blocks, 0..0.9
    encoder_lr_factor  learning rate of the encoder over the decoder's; 0 freezes the encoder
    balance            pixels: every pixel weighs the same; background_foreground: half the loss from background, half from
                       the rest (AFA section 3)
    clipping           null, or WeakTr's rule
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    decoder_blocks: Positive
    decoder_heads: Positive
    decoder_dropout: Annotated[float, Field(ge=0, le=0.9)]
    encoder_lr_factor: NonNegative
    balance: Literal["pixels", "background_foreground"]
    clipping: Clipping | None

    def __post_init__(self) -> None:
        if self.clipping is not None and self.balance != "pixels":
            raise ValueError("clipping works on the plain loss: set balance to pixels, or clipping to null")


@dataclass(frozen=True)
class Options:
    """segment.options.

    block_weights  null: masks of the decoder's last block; or a weight per block, of the mean of the softmax of the logits
                   after each block (WeakTr section 2.4 has [0.8, 1.0])
    """

    block_weights: tuple[NonNegative, ...] | None

    def __post_init__(self) -> None:
        if self.block_weights is not None and sum(self.block_weights) <= 0:
            raise ValueError(
                f"block_weights: got {list(self.block_weights)}, allowed is null or weights whose sum is above 0"
            )


# WeakTr section 2.3, for from_official
PUBLISHED_SCHEDULE = Schedule(
    epochs=100, min_steps=0, batch_size=4, shards=1, lr=1e-4, lr_floor=0.1, weight_decay=0.0, optimiser="sgd",
    schedule="poly", warmup=0
)  # fmt: skip
PUBLISHED_CLIPPING = Clipping(start=1.2, cell=120)
SMALLEST = 1e-30  # a probability that is 0 in single precision must not become minus infinity


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
                f"{params.architecture} (edit retrain.model in the recipe)"
            )
        self.decoder = MaskTransformer(
            len(labels) + 1,
            self.backbone.dim,
            blocks=params.decoder_blocks,
            heads=params.decoder_heads,
            dropout=params.decoder_dropout,
        )

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Segmenter:
        """WeakTr's step-2 weights in its authors' names (encoder.*, decoder.*) → a segmenter with the published settings.

        Width, position grid, decoder blocks and the number of classes are read off the tensors; classes are named "class 1",
        "class 2", … since the file has no names. The wrapper {"model": …} is removed; COCO's 91 planes become background and
        80 classes. ValueError lists missing and unknown keys and other shapes.
        """
        tensors = renamed(unwrapped(state_dict))
        required = ("backbone.net.pos_embed", "decoder.cls_emb")
        missing = [name for name in required if name not in tensors]
        if missing:
            raise ValueError(
                f"these are no weights of WeakTr's segmenter: {', '.join(map(published_name, missing))} missing"
            )
        positions, class_tokens = (tensors[name] for name in required)
        dim, planes = positions.shape[-1], class_tokens.shape[1]
        size = next((size for size, (width, _) in WIDTHS.items() if width == dim), None)
        if size is None:
            raise ValueError(f"there is no published encoder with {dim} channels; known are {WIDTHS}")
        params = Params(
            architecture=f"segmenter_vit_{size}_patch16",
            image_size=PATCH * round((positions.shape[1] - 1) ** 0.5),
            drop_path=0.1,
            decoder_blocks=1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.blocks.")),
            decoder_heads=WIDTHS[size][1],
            decoder_dropout=0.1,
            encoder_lr_factor=0.1,
            balance="pixels",
            clipping=PUBLISHED_CLIPPING,
        )
        labels = LabelSpace(tuple(f"class {value}" for value in range(1, planes)))
        segmenter = cls(labels, params, PUBLISHED_SCHEDULE, vit)
        load_exactly(segmenter, tensors, "this state dict", spoken=published_name)
        return segmenter.eval()

    def load_initial(self, family: Any, init: Path) -> None:
        """The encoder's weights, or those of a whole segmenter: our own segmenter.safetensors, or the authors' checkpoint
        (architecture segmenter_vit_small_patch16 is theirs; train it for 0 epochs to use it as it is)."""
        if not load_whole(self, init, "decoder.cls_emb", renamed, published_name):
            family.load_initial(self.backbone, init)

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("segment")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        return decayed(self.decoder.parameters(), 1.0) + decayed(self.backbone.parameters(), self.params.encoder_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Cross-entropy against pseudo-masks; 255, which padding is too, does not count."""
        del clock
        assert batch.masks is not None  # the loop was given pseudo-masks
        logits, labels = self._logits(batch.images, None)[0].float(), batch.masks.long()
        if self.params.clipping is not None:
            loss = clipped_cross_entropy(logits, labels, start=self.params.clipping.start, cell=self.params.clipping.cell)
        elif self.params.balance == "background_foreground":
            loss = balanced_cross_entropy(logits, labels)
        else:
            loss = mean_cross_entropy(logits, labels)
        return {"segmentation": loss}

    def segment(self, images: Tensor, options: Options) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, any size → logits f32[b,c+1,h,w], plane 0 background.

        With block_weights, the logarithm of the mean of the blocks' softmax; the authors take that mean only after windows
        and views are merged.
        """
        weights = options.block_weights
        if weights is None:
            return self._logits(images, None)[0]
        if len(weights) != len(self.decoder.blocks):
            raise ValueError(
                f"segment.options.block_weights has {len(weights)} weights for {len(self.decoder.blocks)} decoder blocks; "
                "edit the recipe"
            )
        used = [number for number, weight in enumerate(weights) if weight > 0]
        probabilities = [
            logits.float().softmax(dim=1) * (weights[number] / sum(weights))
            for number, logits in zip(used, self._logits(images, used), strict=True)
        ]
        return torch.stack(probabilities).sum(dim=0).clamp(min=SMALLEST).log()

    def _logits(self, images: Tensor, blocks: Sequence[int] | None) -> list[Tensor]:
        """Logits f32[b,c+1,h,w] after the last decoder block, or after each of `blocks` (padding: weaktr.md section 2.1)."""
        h, w = images.shape[-2:]
        padded = pad_to_stride(images, self.backbone)
        features = self.backbone(padded)
        grids = [self.decoder(features)] if blocks is None else self.decoder.after_blocks(features, blocks)
        return [F.interpolate(grid, padded.shape[-2:], mode="bilinear", align_corners=False)[..., :h, :w] for grid in grids]


def published_name(name: str) -> str:
    """Our key name → the authors'."""
    return name.replace("backbone.net.", "encoder.", 1)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours; COCO's 91 planes → background and 80 classes; the encoder's unused classifier is
    dropped."""
    ours = {
        name.replace("encoder.", "backbone.net.", 1): value
        for name, value in tensors.items()
        if not name.startswith("encoder.head.")
    }
    if "decoder.cls_emb" in ours and ours["decoder.cls_emb"].shape[1] == len(COCO_USED_IDS) + len(COCO_UNUSED_IDS) + 1:
        planes = [0, *COCO_USED_IDS]
        ours["decoder.cls_emb"] = ours["decoder.cls_emb"][:, planes]
        names = ("decoder.mask_norm.weight", "decoder.mask_norm.bias")
        ours |= {name: ours[name][planes] for name in names if name in ours}
    return ours


def clipped_cross_entropy(logits: Tensor, labels: Tensor, *, start: float, cell: int) -> Tensor:
    """WeakTr section 2.2: logits f32[b,c,h,w], mask values [b,h,w] → mean over all pixels; ignored ones count as 0.

    Once the mean loss is at most `start`, each pixel's loss is cut at max(mean of its cell over the batch, global mean):
    pixels above it count as a constant and have no gradient. Cells are squares of `cell` px, narrower at the right and lower
    border (the authors pad there, which is the same wherever `cell` divides the sides, as in their crops).
    """
    pixel = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="none")
    h, w = pixel.shape[-2:]
    with torch.no_grad():
        mean = pixel.mean()
        cells = F.avg_pool2d(pixel.mean(dim=0)[None, None], cell, ceil_mode=True, count_include_pad=False)
        limit = torch.maximum(cells, mean).repeat_interleave(cell, -2).repeat_interleave(cell, -1)[0, :, :h, :w]
        limit = torch.where(mean > start, torch.inf, limit)  # on the device: an `if` would wait for the value at each step
    return torch.where(pixel > limit, limit, pixel).mean()
