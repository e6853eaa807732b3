"""APC: a patch classifier, trained through the mean of an image's best patches, and a decoder that learns from it in the
same stage.

No code of the authors is public: docs/methods/apc.md says what is established, what is ViT-PCM's (the base method), and what
is our reconstruction. Shape letters: b images, c classes, d channels of an embedding, gh gw cells of the backbone's map;
plane 0 of c+1 is background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.core.config import AboveZero, Count, NonNegative, Positive, Share
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.imaging import pseudo_labels, transforms
from pipeline.imaging.pooling import valid_cells
from pipeline.imaging.pseudo_labels import LabelSettings
from pipeline.imaging.scoremaps import resized
from pipeline.methods.apc.patch_context import PatchContext
from pipeline.methods.apc.patch_losses import SMALLEST, BackgroundTag, classification_loss, equivariance_loss, patch_contrast
from pipeline.methods.apc.patch_pooling import Pooling, adaptive_k_pooled, chosen_patches
from pipeline.nn import weights
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy
from pipeline.training.settings import Schedule

Dropout = Annotated[float, Field(ge=0, le=0.9)]


@dataclass(frozen=True)
class WarmHead:
    """A first phase that trains the patch classifier and its context on a frozen backbone.

    epochs     passes over the images
    min_steps  a floor, as the schedule's
    lr         peak learning rate; batch size, optimiser and the rest are the schedule's
    """

    epochs: AboveZero
    min_steps: Count
    lr: AboveZero


@dataclass(frozen=True)
class Contrast:
    """Contrast of the patches of a class that score high with those that score low (patch_losses.patch_contrast).

    weight  of the loss
    high    score above which a patch is a high-confidence one of a class (the paper's ε)
    low     score below which it is a low-confidence one (the paper's 1 - ε)
    """

    weight: AboveZero
    high: Share
    low: Share

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(
                f"low {self.low} is above high {self.high}: a patch could be of high and of low confidence at once"
            )


@dataclass(frozen=True)
class Equivariance:
    """Consistency of a second view, mirrored and smaller, with the first (patch_losses.equivariance_loss).

    weight  of the loss
    scale   sides of the second view over the first's
    """

    weight: AboveZero
    scale: Annotated[float, Field(ge=0.25, le=1)]


@dataclass(frozen=True)
class Decoder(LabelSettings):
    """SegFormer's head and the labels that it learns from: thresholds low and high are of a patch's score over its class's
    maximum.

    iters   step of the last phase from which it learns; below 1 a fraction of all its steps
    weight  of its loss
    width   channels of SegFormer's head
    dropout  of whole channels before its last layer
    """

    iters: NonNegative
    weight: AboveZero
    width: Positive
    dropout: Dropout


@dataclass(frozen=True)
class Params:
    """train.model.

    architecture        a network of the backbone family
    image_size          px; a ViT's position embeddings are made for this side, usually augment.size
    drop_path           largest rate of stochastic depth, 0..0.9
    context             bilstm: ViT-PCM's LSTMs along rows and columns (HV-BiLSTM); none: the tokens as they are
    context_width       channels of each of the four LSTM directions; only bilstm uses it
    dropout             of the tokens before context and classifier, and of the LSTMs' input
    pooling             scores of patches → scores of the image
    classifier_std      standard deviation of the classifier's initial weights; 0.05 is ViT-PCM's. Where tokens have a large
                        norm, a smaller one: else the first choice of patches is random
    background_tag      always: every image is tagged with background; none: the background's channel is not in the loss
    classifier_l2       weight of the sum of the classifier's squared weights, as a loss
    warm_head           null, or a first phase with a frozen backbone
    contrast            null, or the loss that pulls high-confidence patches of a class together
    equivariance        null, or the loss of a mirrored, smaller view
    decoder             null, or the single stage's decoder
    backbone_lr_factor  learning rate of the backbone over that of all else; 0 freezes it
    """

    architecture: str
    image_size: Positive
    drop_path: Dropout
    context: Literal["none", "bilstm"]
    context_width: Positive
    dropout: Dropout
    pooling: Pooling
    classifier_std: NonNegative
    background_tag: BackgroundTag
    classifier_l2: NonNegative
    warm_head: WarmHead | None
    contrast: Contrast | None
    equivariance: Equivariance | None
    decoder: Decoder | None
    backbone_lr_factor: NonNegative


@dataclass(frozen=True)
class Options:
    """extract.options.

    source  the score map: patch, the scores of the patches; or decoder, its probability of a class against background:
            merged by rule mean, a threshold of 0.5 then gives the decoder's own masks
    """

    source: Literal["patch", "decoder"]


# ViT-PCM section 2.3, for from_official: its second phase; the early stop on masks is left out
PUBLISHED_SCHEDULE = Schedule(
    epochs=79,
    min_steps=0,
    batch_size=64,
    shards=1,
    lr=1e-4,
    lr_floor=1.0,
    weight_decay=0.0,
    optimiser="adamw",
    schedule="linear",
    warmup=0,
)
KERAS_SUFFIX = ".h5"  # of ViT-PCM's weights
LOGIT_EPS = 1e-6  # tag logits lie within ±13.8


class Method(nn.Module):
    """family: the module `backbone` of a folder of pipeline/nn (create, load_initial)."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        self.stride: int = self.backbone.stride
        self.context = PatchContext(self.backbone.dim, params.context_width) if params.context == "bilstm" else None
        dim = self.backbone.dim if self.context is None else 4 * params.context_width
        self.classifier = nn.Conv2d(dim, len(labels) + 1, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=params.classifier_std)
        self.decoder = None
        if params.decoder is not None:
            width, dropout = params.decoder.width, params.decoder.dropout
            self.decoder = SegFormerHead(self.backbone.dims, len(labels) + 1, width=width, dropout=dropout)
        if params.backbone_lr_factor == 0:
            self.backbone.requires_grad_(False)

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; or a model.safetensors of this method, or ViT-PCM's .h5 (the decoder then starts at
        random).
        Train either for 0 epochs to use it as it is."""
        if init.suffix == KERAS_SUFFIX:
            from pipeline.methods.apc import keras_vit  # a run whose backbone is no ViT does not depend on it

            decoder = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()} if self.decoder else {}
            weights.load_exactly(self, keras_vit.converted(keras_vit.read(init)) | decoder, str(init))
        elif not weights.load_whole(self, init, "classifier.weight"):
            family.load_initial(self.backbone, init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """ViT-PCM's Keras weights {name: array} → a method with its published settings. APC's authors published none.

        Names as in pipeline/methods/apc/keras_vit.py; sizes and the number of classes are read off the arrays. ValueError
        lists missing and unknown names.
        """
        from pipeline.methods.apc import keras_vit

        tensors = keras_vit.converted(state_dict)
        architecture, image_size = keras_vit.architecture_of(tensors)
        recurrent = tensors.get("context.rows.weight_hh_l0")
        params = Params(
            architecture=architecture,
            image_size=image_size,
            drop_path=0.0,
            context="none" if recurrent is None else "bilstm",
            context_width=1 if recurrent is None else recurrent.shape[1],
            dropout=0.2,
            pooling=Pooling("max", 1.0, 1),
            classifier_std=0.05,
            background_tag="always",
            classifier_l2=0.01,
            warm_head=WarmHead(epochs=1.0, min_steps=0, lr=1e-3),
            contrast=None,
            equivariance=Equivariance(weight=1.0, scale=0.5),
            decoder=None,
            backbone_lr_factor=1.0,
        )
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(tensors["classifier.weight"]))))
        method = cls(labels, params, PUBLISHED_SCHEDULE, plugins.load("nn", "vit"))
        weights.load_exactly(method, tensors, "this state dict")
        return method.eval()

    def phases(self) -> list[Phase]:
        last, warm = self.schedule.phase("end_to_end"), self.params.warm_head
        if warm is None:
            return [last]
        return [replace(last, name="head", epochs=warm.epochs, min_steps=warm.min_steps, lr=warm.lr), last]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        heads = [*self.classifier.parameters()]
        heads += [] if self.context is None else [p for p in self.context.parameters() if p.requires_grad]
        if phase.name == "head":
            return decayed(heads, 1.0)
        heads += [] if self.decoder is None else [*self.decoder.parameters()]
        return decayed(heads, 1.0) + decayed(self.backbone.parameters(), self.params.backbone_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """L_MCE, and the losses of params that are not null, each weighted. The decoder does not run before its `iters`."""
        params, last = self.params, len(self.phases()) - 1
        frozen = clock.phase < last or params.backbone_lr_factor == 0
        decoder = params.decoder if clock.phase == last and params.decoder and clock.reached(params.decoder.iters) else None
        maps = self._feature_maps(batch.images, all_depths=decoder is not None, frozen=frozen)
        valid = valid_cells(batch.valid, (maps[-1].shape[-2], maps[-1].shape[-1]))
        dropout = params.dropout if self.training else 0.0
        embeddings, logits = self._classified(maps[-1], dropout)
        scores = logits.softmax(dim=1)
        pooled = self._pooled(scores, valid)
        losses = {"classification": classification_loss(pooled, batch.tags, background_tag=params.background_tag)}
        if params.classifier_l2:
            losses["classifier_l2"] = params.classifier_l2 * self.classifier.weight.square().sum()
        contrast = params.contrast
        if contrast is not None:
            losses["contrast"] = contrast.weight * patch_contrast(
                embeddings,
                scores[:, 1:],
                batch.tags,
                valid,
                high=contrast.high,
                low=contrast.low,
                most=int(batch.on_host.tags.sum(dim=1).max()),
            )
        if decoder is None and params.equivariance is None:
            return losses
        if dropout:  # targets are made without it; running the heads again is cheap, the backbone is not run again
            with torch.no_grad():
                scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        scores = scores.detach() * valid[:, None]
        if params.equivariance is not None:
            losses["equivariance"] = params.equivariance.weight * self._equivariance(batch, scores, frozen)
        if decoder is not None:
            assert self.decoder is not None
            targets = self.training_labels(batch, scores[:, 1:], decoder)
            decoded = F.interpolate(
                self.decoder(maps).float(), batch.images.shape[-2:], mode="bilinear", align_corners=False
            )
            losses["segmentation"] = decoder.weight * balanced_cross_entropy(decoded, targets)
        return losses

    @torch.no_grad()
    def training_labels(self, batch: Batch, scores: Tensor, settings: LabelSettings) -> Tensor:
        """Patch scores f32[b,c,gh,gw] of the classes → the decoder's labels, mask values u8[b,h,w], 255 where undecided and
        on padding: scores of the tags' classes over their maxima, PAR, three-way rule (as AFA's labels)."""
        size = (batch.images.shape[-2], batch.images.shape[-1])
        window = slice(0, size[0]), slice(0, size[1])
        labels = []
        order = batch.tags.argsort(dim=1, descending=True, stable=True)
        for row, count in enumerate(batch.on_host.tags.count_nonzero(dim=1).tolist()):
            classes = order[row, :count]
            tagged = scores[row, classes]
            relative = tagged / tagged.amax(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
            planes = pseudo_labels.plain_planes(resized(relative[None], size)[0], settings)
            labels += pseudo_labels.refined_labels(batch.images[row], [planes], classes, window, settings)
        return torch.stack(labels).masked_fill(~batch.valid, IGNORE)

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """Patch scores or the decoder's by options.source; shapes as in contracts.ScoreMaps. ValueError where there is no
        decoder."""
        del keep_affinity  # APC has none
        if options.source == "decoder" and self.decoder is None:
            raise ValueError(
                "extract.options.source is decoder, but train.model.decoder is null: set source to patch, or train with a "
                "decoder (edit the recipe)"
            )
        maps = self._feature_maps(images, all_depths=self.decoder is not None, frozen=True)
        scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        decoded = None if self.decoder is None else self.decoder(maps).float().softmax(dim=1)
        planes = scores
        if options.source == "decoder":
            assert decoded is not None
            planes = decoded / (decoded + decoded[:, :1])
        logits = torch.logit(self._pooled(scores, None)[:, 1:], eps=LOGIT_EPS)
        return ScoreMaps(planes[:, 1:], None, logits, decoded)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """patch_scores f32[b,c,gh,gw]; chosen_patches f32[b,c,gh,gw], 1 on the K patches that the image's score is the mean
        of; decoder f32[b,c,·,·], probabilities at its own grid, where there is one; background_score f32[b,1,gh,gw]; k and
        tag_scores f32[b,c]."""
        maps = self._feature_maps(images, all_depths=self.decoder is not None, frozen=True)
        scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        pool = self.params.pooling
        chosen = chosen_patches(scores[:, 1:], None, rule=pool.rule, ratio=pool.ratio, k_max=pool.k_max)
        tensors = {"patch_scores": scores[:, 1:], "chosen_patches": chosen}
        if self.decoder is not None:
            tensors["decoder"] = self.decoder(maps).float().softmax(dim=1)[:, 1:]
        return tensors | {
            "background_score": scores[:, :1],
            "k": chosen.sum(dim=(2, 3)),
            "tag_scores": self._pooled(scores, None)[:, 1:],
        }

    def _feature_maps(self, images: Tensor, *, all_depths: bool, frozen: bool) -> list[Tensor]:
        """The backbone's last map; with all_depths, maps of every depth before it. frozen: without gradient."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.backbone.feature_maps(images) if all_depths else [self.backbone(images)]

    def _classified(self, features: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """f32[b,·,gh,gw] → embeddings f32[b,d,gh,gw] and logits f32[b,c+1,gh,gw] (ViT-PCM section 2.1)."""
        if self.context is not None:
            features = self.context(F.dropout(features, dropout), dropout)
        return features, self.classifier(F.dropout(features, dropout)).float()

    def _pooled(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        pool = self.params.pooling
        return adaptive_k_pooled(scores, valid, rule=pool.rule, ratio=pool.ratio, k_max=pool.k_max)

    def _equivariance(self, batch: Batch, scores: Tensor, frozen: bool) -> Tensor:
        """equivariance_loss of a smaller, mirrored view; scores f32[b,c+1,gh,gw] are the first view's, 0 on padding."""
        assert self.params.equivariance is not None
        whole = (batch.images.shape[-2], batch.images.shape[-1])
        size = transforms.view_size(whole, self.params.equivariance.scale, self.stride)
        view = F.interpolate(batch.images, size, mode="bilinear", align_corners=False).flip(-1)
        features = self._feature_maps(view, all_depths=False, frozen=frozen)[-1]
        logits = self._classified(features, self.params.dropout if self.training else 0.0)[1]
        return equivariance_loss(logits, scores, batch.tags)
