"""AFA: affinity learned from attention, which refines the CAM that a decoder learns from, all in one training stage.

docs/methods/afa.md says what is published and what is ours. Shape letters: b images, c classes, k classes of one image's tags,
n = gh * gw cells of the backbone's last map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.core.config import AboveZero, NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.imaging import pseudo_labels, transforms
from pipeline.imaging.affinity import affinity_labels, affinity_loss, propagate
from pipeline.imaging.par import ParSettings
from pipeline.imaging.pooling import Pool, pooled
from pipeline.imaging.pseudo_labels import LabelSettings, SpreadSettings, Window
from pipeline.imaging.scoremaps import merge_views
from pipeline.nn import weights
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, dense_energy
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class Energy:
    """AFA's optional regularisation. weight: of the loss; cells, sigma_rgb (0..1), sigma_xy (share of the long side): see
    training.pixel_losses.dense_energy."""

    weight: AboveZero
    cells: Positive
    sigma_rgb: AboveZero
    sigma_xy: AboveZero


@dataclass(frozen=True)
class Params:
    """train.<m>.model.

    architecture        mit_b0 … mit_b5 (backbone mit), or a timm ViT with plain attention (backbone vit)
    image_size          px; grid of a ViT's position embeddings, usually augment.size
    drop_path           stochastic depth
    pool, topk_share    map → logits: features, the classifier on each channel's maximum (published); or of the CAM gmp maximum, gap
                        mean, topk mean of the highest topk_share
    cam_iters           when the pseudo-labels set in: steps, or below 1 a share of all steps; until then tags alone train
    aff_iters           when the decoder learns from labels that were spread by the affinity; until then from plain ones
    cam_scales          views of the training crop whose CAMs make the labels, each with its mirror image
    pseudo_label_mode   eval: without dropout, stochastic depth and batch statistics; train: with them, as the authors did
    affinity_from       labels that the affinity learns from: cam (published for VOC), or spread once aff_iters is reached (COCO)
    labels              how labels are made of CAMs
    affinity_start      weights of the affinity head: random (published; logits of ViTs then saturate its sigmoid, and a short training
                        does not get them back), or zero
    decoder_width, decoder_dropout   of SegFormer's head
    segmentation_weight, affinity_weight   of the two losses beside the classification's
    energy              null (released code), or the regularisation of the paper's best figures
    freeze_norms        whether the backbone's norms keep their weights (published)
    backbone_lr_factor  learning rate of the backbone over that of classifier and decoder
    affinity_lr_factor  the same of the affinity head (published: 1); a short training needs more
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    pool: Literal["features"] | Pool
    topk_share: Annotated[float, Field(gt=0, le=1)]
    cam_iters: NonNegative
    aff_iters: NonNegative
    cam_scales: tuple[Annotated[float, Field(ge=0.25, le=3)], ...]
    pseudo_label_mode: Literal["eval", "train"]
    affinity_from: Literal["cam", "spread"]
    labels: SpreadSettings
    affinity_start: Literal["random", "zero"]
    decoder_width: Positive
    decoder_dropout: Annotated[float, Field(ge=0, le=0.9)]
    segmentation_weight: NonNegative
    affinity_weight: NonNegative
    energy: Energy | None
    freeze_norms: bool
    backbone_lr_factor: NonNegative
    affinity_lr_factor: AboveZero

    def __post_init__(self) -> None:
        if not self.cam_scales:
            raise ValueError("cam_scales: got [], allowed is at least one factor")


@dataclass(frozen=True)
class Options:
    """extract.<m>.options.

    source  the score map: cam; affinity, the CAM after one step along the affinity; or decoder, its probability of a class against
            background: merged by rule mean, a background level of 0.5 then gives the decoder's own masks
    """

    source: Literal["cam", "affinity", "decoder"]


# Section 4, for from_official
PUBLISHED_SCHEDULE = Schedule(
    epochs=7.6, batch_size=4, shards=1, lr=6e-4, lr_floor=0.0, weight_decay=0.01, optimiser="adamw", schedule="linear",
    warmup=1500,
)  # fmt: skip
PUBLISHED_LABELS = SpreadSettings(0.35, 0.55, ParSettings(0.5, (1, 2, 4, 8, 12, 24), 10, 0.3, 0.01), 8, 2.0, 0.1)
SCORE_EPS = 1e-4  # of the affinity when score maps are spread: the authors' validation has it instead of 0.1
HEAD_STD = 3**-0.5  # Kaiming normal with a = √5 and one output


class Method(nn.Module):
    """family: pipeline.nn.mit.backbone or pipeline.nn.vit.backbone: whatever has `stages`."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if not hasattr(self.backbone, "stages"):
            raise ValueError("AFA learns from attention: set methods.<m>.backbone to mit or vit in params.yaml")
        self.stride: int = self.backbone.stride
        self.classifier = nn.Conv2d(self.backbone.dim, len(labels), 1, bias=False)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        self.attn_proj = nn.Conv2d(self.backbone.blocks * self.backbone.heads, 1, 1)
        nn.init.normal_(self.attn_proj.weight, std=HEAD_STD if params.affinity_start == "random" else 0.0)
        self.decoder = SegFormerHead(
            self.backbone.dims, len(labels) + 1, width=params.decoder_width, dropout=params.decoder_dropout
        )

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; or the authors' checkpoint, or a model.safetensors of this method (train either for 0 epochs to
        use it as it is)."""
        if not weights.load_whole(self, init, "attn_proj.weight", renamed, published_name):
            family.load_initial(self.backbone, init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """The authors' weights (encoder.*, decoder.*, classifier, attn_proj) → a method with the published settings.

        Size of the backbone, decoder and number of classes are read off the tensors; a data-parallel `module.` is cut off.
        ValueError lists the keys that miss, are unknown, or do not fit.
        """
        given = renamed(weights.unwrapped(state_dict))
        needed = ("attn_proj.weight", "classifier.weight", "decoder.linear_c1.proj.weight")
        absent = [name for name in needed if name not in given]
        if absent:
            raise ValueError(f"these are no weights of AFA: {', '.join(absent)} missing")
        mit = plugins.load("nn", "mit")  # by name: the column of a ViT does not depend on it
        params = Params(
            architecture=mit.architecture_of({name.removeprefix("backbone.net."): value for name, value in given.items()}),
            image_size=512,
            drop_path=0.1,
            pool="features",
            topk_share=1.0,
            cam_iters=2000,
            aff_iters=6000,
            cam_scales=(1.0, 0.5, 1.5),
            pseudo_label_mode="train",
            affinity_from="cam",
            labels=PUBLISHED_LABELS,
            affinity_start="random",
            decoder_width=len(given[needed[2]]),
            decoder_dropout=0.1,
            segmentation_weight=0.1,
            affinity_weight=0.1,
            energy=None,
            freeze_norms=True,
            backbone_lr_factor=0.1,
            affinity_lr_factor=1.0,
        )
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(given[needed[1]]) + 1)))
        made = cls(labels, params, PUBLISHED_SCHEDULE, mit)
        weights.load_exactly(made, given, "this state dict", spoken=published_name)
        return made.eval()

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("end_to_end")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        norms = {id(p) for name, p in self.backbone.named_parameters() if self.params.freeze_norms and "norm" in name}
        heads = [*self.classifier.parameters(), *self.decoder.parameters()]
        fine_tuned = [p for p in self.backbone.parameters() if id(p) not in norms]
        return (
            decayed(heads, 1.0)
            + decayed(self.attn_proj.parameters(), self.params.affinity_lr_factor)
            + decayed(fine_tuned, self.params.backbone_lr_factor)
        )

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Classification; from cam_iters on also segmentation and affinity, whose labels are made on the spot (section 3).

        Before that neither decoder nor labels are computed: they would weigh nothing.
        """
        grid = batch.images.shape[-2] // self.stride, batch.images.shape[-1] // self.stride
        seen = F.adaptive_max_pool2d(batch.valid[:, None].float(), grid)[:, 0] > 0
        if not clock.reached(self.params.cam_iters):
            return {"classification": self._classification(self.backbone(batch.images), seen, batch.tags)}
        targets, pair_targets = self.training_labels(batch, spread=clock.reached(self.params.aff_iters))
        features, asked = self.backbone.stages(batch.images)
        logits = F.interpolate(self.decoder(features).float(), batch.images.shape[-2:], mode="bilinear", align_corners=False)
        cells = pair_targets[:, :: self.stride, :: self.stride]
        pairs = affinity_labels(cells, radius=self.params.labels.radius)
        found = {
            "classification": self._classification(features[-1], seen, batch.tags),
            "segmentation": self.params.segmentation_weight * balanced_cross_entropy(logits, targets),
            "affinity": self.params.affinity_weight * affinity_loss(self._affinity(asked), pairs),
        }
        energy = self.params.energy
        if energy is not None:
            found["energy"] = energy.weight * dense_energy(
                batch.images,
                logits.softmax(dim=1),
                batch.valid,
                cells=energy.cells,
                sigma_rgb=energy.sigma_rgb,
                sigma_xy=energy.sigma_xy,
            )
        return found

    @torch.no_grad()
    def training_labels(self, batch: Batch, *, spread: bool) -> tuple[Tensor, Tensor]:
        """What the decoder and what the affinity learn from, u8[b,h,w] each, 255 on padding.

        spread: whether the decoder's are spread along the affinity; the affinity itself is only computed then.
        """
        size = (batch.images.shape[-2], batch.images.shape[-1])
        views, affinity = self._training_views(batch.images, spread)
        grid = views[0].shape[-2], views[0].shape[-1]  # the largest scale's, which the affinity belongs to
        both = spread and self.params.affinity_from == "cam"
        targets, pair_targets = [], []
        for row, tags in enumerate(batch.tags):
            classes, settings = torch.nonzero(tags).flatten(), self.params.labels
            scores = merge_views([view[row][:, classes] for view in views], rule="afa", size=size)
            window = _window(batch.valid[row])
            plain = pseudo_labels.plain_planes(scores, settings) if both or not spread else None
            walked = pseudo_labels.spread_planes(scores, affinity[row], grid, settings) if affinity is not None else None
            labels = _labels(batch.images[row], plain, walked, classes, window, settings)
            targets.append(labels[-1])
            pair_targets.append(labels[0] if self.params.affinity_from == "cam" else labels[-1])
        return torch.stack(targets), torch.stack(pair_targets)

    def _training_views(self, images: Tensor, spread: bool) -> tuple[list[Tensor], Tensor | None]:
        """CAMs f32[b,2,c,gh,gw] of each scale with its mirror image, largest first, and the affinity of the largest."""
        views, affinity = [], None
        with self._labelling():
            for scale in sorted(self.params.cam_scales, reverse=True):
                size = transforms.view_size((images.shape[-2], images.shape[-1]), scale, self.stride)
                view = images
                if size != tuple(images.shape[-2:]):
                    view = F.interpolate(images, size, mode="bilinear", align_corners=False)
                if spread and affinity is None:  # the mirror image's is not used
                    features, asked = self.backbone.stages(view)
                    affinity = self._affinity(asked)
                    maps = [self.classifier(features[-1]), self.classifier(self.backbone(view.flip(-1)))]
                else:
                    maps = self.classifier(self.backbone(torch.cat([view, view.flip(-1)]))).chunk(2)
                views.append(torch.stack(tuple(maps), dim=1).float())
        return views, affinity

    @contextmanager
    def _labelling(self) -> Iterator[None]:
        """Labels are made without the noise of training, unless the authors' way is asked for."""
        training = self.training
        self.train(training and self.params.pseudo_label_mode == "train")
        try:
            yield
        finally:
            self.train(training)

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """CAM, spread CAM or decoder by options.source; shapes as in contracts.ScoreMaps."""
        features, asked = self.backbone.stages(images)
        maps = self.classifier(features[-1]).float()
        decoded = self.decoder(features).float().softmax(dim=1)
        scores = decoded[:, 1:] / (decoded[:, 1:] + decoded[:, :1]) if options.source == "decoder" else maps.relu()
        kept = []
        for row in range(len(images)) if keep_affinity or options.source == "affinity" else ():
            affinity = self._affinity([(queries[row, None], keys[row, None]) for queries, keys in asked])  # n² values each
            if options.source == "affinity":
                scores[row, None] = self._spread(scores[row, None], affinity)
            if keep_affinity:
                kept.append(affinity)
        return ScoreMaps(scores, torch.cat(kept) if kept else None, self._logits(features[-1], None), decoded)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """cam f32[b,c,gh,gw] before the ReLU, spread (its ReLU after one step along the affinity), decoder (probabilities at the
        decoder's grid); cls_logits f32[b,c], seg_logits f32[b,c+1,·,·], affinity f32[b,n,n], and attention_logits
        f32[b,blocks,heads,n,n], q · k of the last blocks before scale and softmax."""
        features, asked = self.backbone.stages(images)
        maps, decoded, affinity = (
            self.classifier(features[-1]).float(),
            self.decoder(features).float(),
            self._affinity(asked),
        )
        return {
            "cam": maps,
            "spread": self._spread(maps.relu(), affinity),
            "decoder": decoded.softmax(dim=1)[:, 1:],
            "cls_logits": self._logits(features[-1], None),
            "seg_logits": decoded,
            "affinity": affinity,
            "attention_logits": torch.stack([(queries @ keys.transpose(-1, -2)).float() for queries, keys in asked], dim=1),
        }

    def _affinity(self, asked: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Queries and keys [b,heads,n,width] of some blocks → f32[b,n,n], sigmoid of a learned mix of the heads' logits, made
        symmetric (section 1).

        Σ_h w_h q_h kᵀ_h is the product of the weighted queries and the keys of all heads laid end to end, so that the logits of
        the single heads are never made.
        """
        heads = self.attn_proj.weight.flatten().split([queries.shape[1] for queries, _ in asked])
        queries = [given * weights[:, None, None] for weights, (given, _) in zip(heads, asked, strict=True)]
        laid = [
            torch.cat([given.transpose(1, 2).flatten(2) for given in side], dim=2)
            for side in (queries, [keys for _, keys in asked])
        ]
        mixed = (laid[0] @ laid[1].transpose(1, 2)).float()
        bias = self.attn_proj.bias
        assert bias is not None
        return torch.sigmoid(mixed + mixed.transpose(1, 2) + bias)

    def _spread(self, scores: Tensor, affinity: Tensor) -> Tensor:
        labels = self.params.labels
        return propagate(scores, affinity, radius=labels.radius, power=labels.power, eps=SCORE_EPS)

    def _classification(self, features: Tensor, seen: Tensor, tags: Tensor) -> Tensor:
        return F.multilabel_soft_margin_loss(self._logits(features, seen), tags)

    def _logits(self, features: Tensor, seen: Tensor | None) -> Tensor:
        """f32[b,dim,gh,gw] → f32[b,c]; padding takes no part."""
        if self.params.pool == "features":
            best = pooled(features, seen, pool="gmp", topk_share=1.0)
            return self.classifier(best[..., None, None])[..., 0, 0].float()
        return pooled(self.classifier(features).float(), seen, pool=self.params.pool, topk_share=self.params.topk_share)


def _window(valid: Tensor) -> Window:
    """bool[h,w], true on a rectangle → that rectangle."""
    rows, columns = torch.nonzero(valid.any(dim=1)).flatten(), torch.nonzero(valid.any(dim=0)).flatten()
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _labels(
    pixels: Tensor, plain: Tensor | None, walked: Tensor | None, classes: Tensor, window: Window, settings: LabelSettings
) -> list[Tensor]:
    """Labels of the plain planes, then of the spread ones, of whichever there are. The authors refine the spread ones inside the
    window alone; where it is the whole crop, both share one refinement."""
    whole = (slice(0, pixels.shape[-2]), slice(0, pixels.shape[-1]))
    refine = pseudo_labels.refined_labels
    if walked is None or window == whole:
        return refine(pixels, [one for one in (plain, walked) if one is not None], classes, window, settings)
    labels = [] if plain is None else refine(pixels, [plain], classes, window, settings)
    spread = torch.full(pixels.shape[-2:], IGNORE, dtype=torch.uint8, device=pixels.device)
    if spread[window].numel():
        inner = pixels[(slice(None), *window)]
        all_of_it = (slice(0, inner.shape[-2]), slice(0, inner.shape[-1]))
        spread[window] = refine(inner, [walked[(..., *window)]], classes, all_of_it, settings)[0]
    return [*labels, spread]


def published_name(name: str) -> str:
    """Our key name → the authors'."""
    return name.replace("backbone.net.", "encoder.", 1)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours; a counter that nobody reads may be missing."""
    found = {
        f"backbone.net.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name: value
        for name, value in tensors.items()
    }
    return {"decoder.linear_fuse.bn.num_batches_tracked": torch.tensor(0)} | found
