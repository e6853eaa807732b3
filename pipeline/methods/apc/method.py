"""APC: a classifier of single patches, whose best patches speak for the image, and a decoder that learns from them in the same stage.

No code of the authors is public: docs/methods/apc.md says what is established, what is ViT-PCM's (the base method), and what is our
reconstruction. Shape letters: b images, c classes, d channels of an embedding, gh gw cells of the backbone's map; plane 0 of c+1 is
background.
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
from pipeline.core.config import AboveZero, NonNegative, Positive, Share
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.imaging import pseudo_labels, transforms
from pipeline.imaging.pseudo_labels import LabelSettings
from pipeline.imaging.scoremaps import resized
from pipeline.methods.apc.patch_pooling import Pooling, adaptive_k_pooled, chosen_patches, patch_contrast
from pipeline.nn import weights
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy
from pipeline.training.settings import Schedule

Dropout = Annotated[float, Field(ge=0, le=0.9)]


@dataclass(frozen=True)
class WarmHead:
    """A first phase that trains the patch classifier and its context on a frozen backbone.

    epochs  passes over the images
    lr      peak learning rate; batch size, optimiser and the rest are the schedule's
    """

    epochs: AboveZero
    lr: AboveZero


@dataclass(frozen=True)
class Contrast:
    """weight of the loss; a patch is sure of a class where its score is above high, unsure below low (the paper's ε and 1 - ε)."""

    weight: AboveZero
    high: Share
    low: Share

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}: patches would be sure and unsure at once")


@dataclass(frozen=True)
class Equivariance:
    """weight of the loss; scale: factor of the mirrored second view's sides."""

    weight: AboveZero
    scale: Annotated[float, Field(ge=0.25, le=1)]


@dataclass(frozen=True)
class Decoder(LabelSettings):
    """How its labels are made, low and high being set against a patch's score over its class's maximum, and

    iters   when it starts to learn: steps, or below 1 a share of all steps of the last phase
    weight  of its loss
    width, dropout   of SegFormer's head
    """

    iters: NonNegative
    weight: AboveZero
    width: Positive
    dropout: Dropout


@dataclass(frozen=True)
class Params:
    """train.<m>.model.

    architecture        a name of the backbone family
    image_size          px; grid of a ViT's position embeddings, usually augment.size
    drop_path           stochastic depth
    context             bilstm: ViT-PCM's LSTMs along rows and columns (HV-BiLSTM); none: the tokens as they are
    context_width       channels of each of the four LSTM directions; only bilstm uses it
    dropout             of the tokens before context and classifier, and of what enters the LSTMs
    pooling             patches → image
    classifier_std      of the classifier's start; 0.05 is ViT-PCM's. Long tokens make its first choice of patches mere chance: smaller
    background_tag      always: every image is tagged with background; none: the background's channel is not in the loss
    classifier_l2       times the sum of the classifier's squared weights, as a loss
    warm_head           null, or a first phase with a frozen backbone
    contrast            null, or the loss that pulls sure patches of a class together
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
    background_tag: Literal["always", "none"]
    classifier_l2: NonNegative
    warm_head: WarmHead | None
    contrast: Contrast | None
    equivariance: Equivariance | None
    decoder: Decoder | None
    backbone_lr_factor: NonNegative


@dataclass(frozen=True)
class Options:
    """extract.<m>.options.

    source  the score map: patch, the scores of the patches; or decoder, its probability of a class against background: merged by
            rule mean, a background level of 0.5 then gives the decoder's own masks
    """

    source: Literal["patch", "decoder"]


# ViT-PCM section 2.3, for from_official: its second phase; the early stop on masks is left out
PUBLISHED_SCHEDULE = Schedule(
    epochs=79,
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
SMALLEST = 1e-12  # of a probability whose logarithm is taken, and of a maximum that is divided by
LOGIT_EPS = 1e-6  # tag logits lie within ±13.8


class PatchContext(nn.Module):
    """ViT-PCM's HV-BiLSTM: each patch reads its row and its column in both directions, f32[b,d,gh,gw] → f32[b,4·width,gh,gw]."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.rows = nn.LSTM(dim, width, batch_first=True, bidirectional=True)
        self.cols = nn.LSTM(dim, width, batch_first=True, bidirectional=True)
        for name, value in self.named_parameters():  # Keras's start
            if "weight_ih" in name:
                nn.init.xavier_uniform_(value)
            elif "weight_hh" in name:
                nn.init.orthogonal_(value)
            else:
                nn.init.zeros_(value)
            if "bias_ih" in name:
                nn.init.ones_(value.data[width : 2 * width])  # forget gate
            if "bias_hh" in name:
                value.requires_grad_(False)  # Keras has one bias

    def forward(self, maps: Tensor, dropout: float) -> Tensor:
        b, dim, gh, gw = maps.shape
        given = maps.permute(0, 2, 3, 1)
        along_rows = F.dropout(given, dropout).reshape(b * gh, gw, dim)
        along_cols = F.dropout(given, dropout).transpose(1, 2).reshape(b * gw, gh, dim)
        rows = self.rows(along_rows)[0].view(b, gh, gw, -1)
        cols = self.cols(along_cols)[0].view(b, gw, gh, -1).transpose(1, 2)
        return torch.cat([rows, cols], dim=3).permute(0, 3, 1, 2)


class Method(nn.Module):
    """family: a module of pipeline/nn (create, load_initial)."""

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
        """The backbone's weights; or a model.safetensors of this method, or ViT-PCM's .h5 (the decoder then starts at random).
        Train either for 0 epochs to use it as it is."""
        if init.suffix == KERAS_SUFFIX:
            from pipeline.methods.apc import keras_vit  # a column whose backbone is no ViT does not depend on it

            started = {f"decoder.{name}": value for name, value in self.decoder.state_dict().items()} if self.decoder else {}
            weights.load_exactly(self, keras_vit.converted(keras_vit.read(init)) | started, str(init))
        elif not weights.load_whole(self, init, "classifier.weight"):
            family.load_initial(self.backbone, init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """ViT-PCM's Keras weights {name: array} → a method with its published settings. APC's authors published none.

        Names as in pipeline/methods/apc/keras_vit.py; sizes and the number of classes are read off the arrays. ValueError lists the names
        that miss or are unknown.
        """
        from pipeline.methods.apc import keras_vit

        given = keras_vit.converted(state_dict)
        architecture, image_size = keras_vit.architecture_of(given)
        recurrent = given.get("context.rows.weight_hh_l0")
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
            warm_head=WarmHead(epochs=1.0, lr=1e-3),
            contrast=None,
            equivariance=Equivariance(weight=1.0, scale=0.5),
            decoder=None,
            backbone_lr_factor=1.0,
        )
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(given["classifier.weight"]))))
        made = cls(labels, params, PUBLISHED_SCHEDULE, plugins.load("nn", "vit"))
        weights.load_exactly(made, given, "this state dict")
        return made.eval()

    def phases(self) -> list[Phase]:
        last, warm = self.schedule.phase("end_to_end"), self.params.warm_head
        return [last] if warm is None else [replace(last, name="head", epochs=warm.epochs, lr=warm.lr), last]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        heads = [*self.classifier.parameters()]
        heads += [] if self.context is None else [p for p in self.context.parameters() if p.requires_grad]
        if phase.name == "head":
            return decayed(heads, 1.0)
        heads += [] if self.decoder is None else [*self.decoder.parameters()]
        return decayed(heads, 1.0) + decayed(self.backbone.parameters(), self.params.backbone_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Classification and what params ask for beside it. The decoder neither runs nor costs anything before its warm-up ends."""
        params, last = self.params, len(self.phases()) - 1
        frozen = clock.phase < last or params.backbone_lr_factor == 0
        decoder = params.decoder if clock.phase == last and params.decoder and clock.reached(params.decoder.iters) else None
        maps = self._maps(batch.images, staged=decoder is not None, frozen=frozen)
        seen = F.adaptive_max_pool2d(batch.valid[:, None].float(), maps[-1].shape[-2:])[:, 0] > 0
        dropout = params.dropout if self.training else 0.0
        embedded, logits = self._classified(maps[-1], dropout)
        scores = logits.softmax(dim=1)
        found = {"classification": self._classification(self._pooled(scores, seen), batch.tags)}
        if params.classifier_l2:
            found["classifier_l2"] = params.classifier_l2 * self.classifier.weight.square().sum()
        contrast = params.contrast
        if contrast is not None:
            found["contrast"] = contrast.weight * patch_contrast(
                embedded, scores[:, 1:], batch.tags, seen, high=contrast.high, low=contrast.low
            )
        if decoder is None and params.equivariance is None:
            return found
        if dropout:  # targets are made without it; running the heads again is cheap, the backbone is not run again
            with torch.no_grad():
                scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        scores = scores.detach() * seen[:, None]
        if params.equivariance is not None:
            found["equivariance"] = params.equivariance.weight * self._equivariance(batch, scores, frozen)
        if decoder is not None:
            assert self.decoder is not None
            targets = self.training_labels(batch, scores[:, 1:], decoder)
            decoded = F.interpolate(
                self.decoder(maps).float(), batch.images.shape[-2:], mode="bilinear", align_corners=False
            )
            found["segmentation"] = decoder.weight * balanced_cross_entropy(decoded, targets)
        return found

    @torch.no_grad()
    def training_labels(self, batch: Batch, scores: Tensor, settings: LabelSettings) -> Tensor:
        """Patch scores f32[b,c,gh,gw] of the classes → what the decoder learns from, u8[b,h,w] with 255 on padding: classes of the
        tags, each over its maximum, PAR, three-way rule (as AFA's labels)."""
        size = (batch.images.shape[-2], batch.images.shape[-1])
        window = slice(0, size[0]), slice(0, size[1])
        labels = []
        for row, tags in enumerate(batch.tags):
            classes = torch.nonzero(tags).flatten()
            kept = scores[row, classes]
            kept = kept / kept.amax(dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
            plane = pseudo_labels.plain_planes(resized(kept[None], size)[0], settings)
            labels += pseudo_labels.refined_labels(batch.images[row], [plane], classes, window, settings)
        return torch.stack(labels).masked_fill(~batch.valid, IGNORE)

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """Patch scores or the decoder's by options.source; shapes as in contracts.ScoreMaps. ValueError where there is no decoder."""
        del keep_affinity  # it has none
        if options.source == "decoder" and self.decoder is None:
            raise ValueError(
                "extract.<m>.options.source is decoder, but train.<m>.model.decoder is null: set source to patch, or train with a "
                "decoder (edit params.yaml)"
            )
        maps = self._maps(images, staged=self.decoder is not None, frozen=True)
        scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        decoded = None if self.decoder is None else self.decoder(maps).float().softmax(dim=1)
        against = scores
        if options.source == "decoder":
            assert decoded is not None
            against = decoded / (decoded + decoded[:, :1])
        logits = torch.logit(self._pooled(scores, None)[:, 1:], eps=LOGIT_EPS)
        return ScoreMaps(against[:, 1:], None, logits, decoded)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """patch_scores f32[b,c,gh,gw], chosen_patches (1 on the K patches that speak for a class), decoder (probabilities at its
        own grid, where there is one); background_score f32[b,1,gh,gw], k and tag_scores f32[b,c]."""
        maps = self._maps(images, staged=self.decoder is not None, frozen=True)
        scores = self._classified(maps[-1], 0.0)[1].softmax(dim=1)
        pool = self.params.pooling
        chosen = chosen_patches(scores[:, 1:], None, rule=pool.rule, ratio=pool.ratio, k_max=pool.k_max)
        found = {"patch_scores": scores[:, 1:], "chosen_patches": chosen}
        if self.decoder is not None:
            found["decoder"] = self.decoder(maps).float().softmax(dim=1)[:, 1:]
        return found | {
            "background_score": scores[:, :1],
            "k": chosen.sum(dim=(2, 3)),
            "tag_scores": self._pooled(scores, None)[:, 1:],
        }

    def _maps(self, images: Tensor, *, staged: bool, frozen: bool) -> list[Tensor]:
        """The backbone's last map, behind the earlier ones where the decoder wants them."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            return self.backbone.feature_maps(images) if staged else [self.backbone(images)]

    def _classified(self, features: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """f32[b,·,gh,gw] → embeddings f32[b,d,gh,gw] and logits f32[b,c+1,gh,gw] (ViT-PCM section 2.1)."""
        if self.context is not None:
            features = self.context(F.dropout(features, dropout), dropout)
        return features, self.classifier(F.dropout(features, dropout)).float()

    def _pooled(self, scores: Tensor, seen: Tensor | None) -> Tensor:
        pool = self.params.pooling
        return adaptive_k_pooled(scores, seen, rule=pool.rule, ratio=pool.ratio, k_max=pool.k_max)

    def _classification(self, pooled: Tensor, tags: Tensor) -> Tensor:
        """f32[b,c+1] in 0..1, f32[b,c] → mean binary cross-entropy over images and channels (MCE). By hand, because torch's
        refuses probabilities under autocast."""
        wanted = F.pad(tags, (1, 0), value=1.0)
        if self.params.background_tag == "none":
            pooled, wanted = pooled[:, 1:], tags
        yes, no = (share.clamp(min=SMALLEST).log() for share in (pooled, 1 - pooled))
        return -(wanted * yes + (1 - wanted) * no).mean()

    def _equivariance(self, batch: Batch, scores: Tensor, frozen: bool) -> Tensor:
        """Cross-entropy of a smaller, mirrored view with the first view's scores f32[b,c+1,gh,gw] (0 on padding), merged with the
        tags, as target: a mean over the cells that are no padding."""
        assert self.params.equivariance is not None
        whole = (batch.images.shape[-2], batch.images.shape[-1])
        size = transforms.view_size(whole, self.params.equivariance.scale, self.stride)
        view = F.interpolate(batch.images, size, mode="bilinear", align_corners=False).flip(-1)
        features = self._maps(view, staged=False, frozen=frozen)[-1]
        logits = self._classified(features, self.params.dropout if self.training else 0.0)[1]
        small = F.interpolate(scores, logits.shape[-2:], mode="bilinear", align_corners=False).flip(-1)
        target = merged_with_tags(small, batch.tags)
        counted = target.sum(dim=1) > 0
        return -(target * logits.log_softmax(dim=1)).sum() / counted.sum().clamp(min=1)


def merged_with_tags(scores: Tensor, tags: Tensor) -> Tensor:
    """Scores f32[b,c+1,gh,gw], tags f32[b,c] → the same over background and tagged classes alone, each over its maximum; a cell sums
    to 1, or to 0 where nothing scores (ViT-PCM's merge_class_labels)."""
    kept = scores * F.pad(tags, (1, 0), value=1.0)[..., None, None]
    relative = kept / kept.amax(dim=(2, 3), keepdim=True).clamp(min=SMALLEST)
    return relative / relative.sum(dim=1, keepdim=True).clamp(min=SMALLEST)
