"""AFA: an affinity learned from self-attention refines the CAM into the labels of a decoder, all in one training stage.

docs/methods/afa.md says what is published and what is ours. Shape letters: b images, c classes, k classes of one image's
tags, n = gh * gw cells of the backbone's last map.
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
from pipeline.core.labels import LabelSpace
from pipeline.imaging import pseudo_labels, transforms
from pipeline.imaging.affinity import affinity_labels, affinity_loss, propagate
from pipeline.imaging.par import ParSettings
from pipeline.imaging.pooling import Pool, pooled, valid_cells
from pipeline.imaging.pseudo_labels import SpreadSettings
from pipeline.imaging.scoremaps import merge_views
from pipeline.methods.afa.labels import classes_and_windows, image_labels
from pipeline.nn import weights
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.training.optim import decayed
from pipeline.training.pixel_losses import balanced_cross_entropy, dense_energy
from pipeline.training.settings import Schedule

HAS_AFFINITY = True


@dataclass(frozen=True)
class Energy:
    """AFA's optional regularised loss (training.pixel_losses.dense_energy).

    weight     of the loss
    cells      most cells along a side of the grid whose pairs are compared
    sigma_rgb  standard deviation of the colour kernel, colours in 0..1
    sigma_xy   standard deviation of the distance kernel, a fraction of the image's long side
    """

    weight: AboveZero
    cells: Positive
    sigma_rgb: AboveZero
    sigma_xy: AboveZero


@dataclass(frozen=True)
class Params:
    """train.model.

    architecture        mit_b0 … mit_b5 (backbone mit), or a timm ViT with plain attention (backbone vit)
    image_size          px; a ViT's position embeddings are made for this side, usually augment.size
    drop_path           largest rate of stochastic depth, 0..0.9
    pool                map → logits: features, the classifier on each channel's maximum (published); or of the CAM gmp
                        maximum, gap mean, topk mean of the highest topk_share
    topk_share          fraction of the cells, at least one cell; only topk uses it
    cam_iters           step from which decoder and affinity learn; below 1 a fraction of all steps; until then only the
                        classification loss is there
    aff_iters           the same of the step from which the decoder's labels are spread along the affinity; until then they
                        are plain
    cam_scales          scales of the training crop whose CAMs are merged into labels, each with its mirror image
    pseudo_label_mode   eval: without dropout, stochastic depth and batch statistics; train: with them, as the authors did
    affinity_from       labels that the affinity learns from: cam (published for VOC), or spread once aff_iters is reached
                        (COCO)
    labels              CAM → label map: thresholds, PAR and propagation
    affinity_start      weights of the affinity head: random (published; logits of ViTs then saturate its sigmoid, and a
                        short training does not get them back), or zero
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
    """extract.options.

    source  the score map: cam; affinity, the CAM after one propagation along the affinity; or decoder, its probability of a
            class against background: merged by rule mean, a threshold of 0.5 then gives the decoder's own masks
    """

    source: Literal["cam", "affinity", "decoder"]


# Section 4, for from_official
PUBLISHED_SCHEDULE = Schedule(
    epochs=7.6, min_steps=0, batch_size=4, shards=1, lr=6e-4, lr_floor=0.0, weight_decay=0.01, optimiser="adamw",
    schedule="linear",
    warmup=1500,
)  # fmt: skip
PUBLISHED_LABELS = SpreadSettings(0.35, 0.55, ParSettings(0.5, (1, 2, 4, 8, 12, 24), 10, 0.3, 0.01), 8, 2.0, 0.1)
SCORE_EPS = (
    1e-4  # added to the affinity's column sums when score maps are spread: the authors' validation has it instead of 0.1
)
AFFINITY_STD = 3**-0.5  # Kaiming normal with a = √5 and one output


class Method(nn.Module):
    """family: pipeline.nn.mit.backbone or pipeline.nn.vit.backbone, whose backbones give queries and keys (`stages`)."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        if not hasattr(self.backbone, "stages"):
            raise ValueError("AFA learns from attention: set methods.<run>.backbone to mit or vit in params.yaml")
        self.stride: int = self.backbone.stride
        self.classifier = nn.Conv2d(self.backbone.dim, len(labels), 1, bias=False)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        self.attn_proj = nn.Conv2d(self.backbone.blocks * self.backbone.heads, 1, 1)
        nn.init.normal_(self.attn_proj.weight, std=AFFINITY_STD if params.affinity_start == "random" else 0.0)
        self.decoder = SegFormerHead(
            self.backbone.dims, len(labels) + 1, width=params.decoder_width, dropout=params.decoder_dropout
        )

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; or the authors' checkpoint, or a model.safetensors of this method (train either for 0
        epochs to use it as it is)."""
        if not weights.load_whole(self, init, "attn_proj.weight", renamed, published_name):
            family.load_initial(self.backbone, init)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Method:
        """The authors' weights (encoder.*, decoder.*, classifier, attn_proj) → a method with the published settings.

        Size of the backbone, decoder and number of classes are read off the tensors; a data-parallel `module.` is cut off.
        ValueError lists missing and unknown keys and other shapes.
        """
        tensors = renamed(weights.unwrapped(state_dict))
        required = ("attn_proj.weight", "classifier.weight", "decoder.linear_c1.proj.weight")
        missing = [name for name in required if name not in tensors]
        if missing:
            raise ValueError(f"these are no weights of AFA: {', '.join(missing)} missing")
        mit = plugins.load("nn", "mit")  # by name: a run with a ViT does not depend on it
        params = Params(
            architecture=mit.architecture_of({name.removeprefix("backbone.net."): value for name, value in tensors.items()}),
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
            decoder_width=len(tensors["decoder.linear_c1.proj.weight"]),
            decoder_dropout=0.1,
            segmentation_weight=0.1,
            affinity_weight=0.1,
            energy=None,
            freeze_norms=True,
            backbone_lr_factor=0.1,
            affinity_lr_factor=1.0,
        )
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(tensors["classifier.weight"]) + 1)))
        method = cls(labels, params, PUBLISHED_SCHEDULE, mit)
        weights.load_exactly(method, tensors, "this state dict", spoken=published_name)
        return method.eval()

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
        """L = L_cls + λ1 L_seg + λ2 L_aff (section 3), each weighted; the latter two, and energy, only from cam_iters on.

        Until then neither decoder nor labels are computed. Labels are made of the batch's own CAMs, without gradient.
        """
        grid = batch.images.shape[-2] // self.stride, batch.images.shape[-1] // self.stride
        valid = valid_cells(batch.valid, grid)
        if not clock.reached(self.params.cam_iters):
            return {"classification": self._classification(self.backbone(batch.images), valid, batch.tags)}
        targets, pair_targets = self.training_labels(batch, spread=clock.reached(self.params.aff_iters))
        features, queries_keys = self.backbone.stages(batch.images)
        logits = F.interpolate(self.decoder(features).float(), batch.images.shape[-2:], mode="bilinear", align_corners=False)
        cell_labels = pair_targets[:, :: self.stride, :: self.stride]
        pair_labels = affinity_labels(cell_labels, radius=self.params.labels.radius)
        losses = {
            "classification": self._classification(features[-1], valid, batch.tags),
            "segmentation": self.params.segmentation_weight * balanced_cross_entropy(logits, targets),
            "affinity": self.params.affinity_weight * affinity_loss(self.affinity(queries_keys), pair_labels),
        }
        energy = self.params.energy
        if energy is not None:
            losses["energy"] = energy.weight * dense_energy(
                batch.images,
                logits.softmax(dim=1),
                batch.valid,
                cells=energy.cells,
                sigma_rgb=energy.sigma_rgb,
                sigma_xy=energy.sigma_xy,
            )
        return losses

    @torch.no_grad()
    def training_labels(self, batch: Batch, *, spread: bool) -> tuple[Tensor, Tensor]:
        """Label maps of the decoder and of the affinity, u8[b,h,w] mask values, 255 where undecided and on padding.

        spread: whether the decoder's labels are spread along the affinity, which is computed only then.
        """
        size = (batch.images.shape[-2], batch.images.shape[-1])
        views, affinity = self._training_views(batch.images, spread)
        grid = views[0].shape[-2], views[0].shape[-1]  # the largest scale's, which the affinity belongs to
        needs_plain = not spread or self.params.affinity_from == "cam"
        targets, pair_targets = [], []
        settings = self.params.labels
        for row, (classes, window) in enumerate(classes_and_windows(batch)):
            scores = merge_views([view[row][:, classes] for view in views], rule="afa", size=size)
            plain = pseudo_labels.plain_planes(scores, settings) if needs_plain else None
            spread_planes = None if affinity is None else pseudo_labels.spread_planes(scores, affinity[row], grid, settings)
            labels = image_labels(batch.images[row], plain, spread_planes, classes, window, settings)
            targets.append(labels[-1])
            pair_targets.append(labels[0] if self.params.affinity_from == "cam" else labels[-1])
        return torch.stack(targets), torch.stack(pair_targets)

    def _training_views(self, images: Tensor, spread: bool) -> tuple[list[Tensor], Tensor | None]:
        """CAMs f32[b,2,c,gh,gw] per scale, largest first; axis 1: the image, its mirror image. And the affinity f32[b,n,n]
        of the largest scale, None unless `spread`."""
        views, affinity = [], None
        with self._labelling():
            for scale in sorted(self.params.cam_scales, reverse=True):
                size = transforms.view_size((images.shape[-2], images.shape[-1]), scale, self.stride)
                view = images
                if size != tuple(images.shape[-2:]):
                    view = F.interpolate(images, size, mode="bilinear", align_corners=False)
                if spread and affinity is None:  # the mirror image's is not used
                    features, queries_keys = self.backbone.stages(view)
                    affinity = self.affinity(queries_keys)
                    maps = [self.classifier(features[-1]), self.classifier(self.backbone(view.flip(-1)))]
                else:
                    maps = self.classifier(self.backbone(torch.cat([view, view.flip(-1)]))).chunk(2)
                views.append(torch.stack(tuple(maps), dim=1).float())
        return views, affinity

    @contextmanager
    def _labelling(self) -> Iterator[None]:
        """Eval mode while labels are made, unless pseudo_label_mode is train."""
        training = self.training
        self.train(training and self.params.pseudo_label_mode == "train")
        try:
            yield
        finally:
            self.train(training)

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """CAM, spread CAM or decoder by options.source; shapes as in contracts.ScoreMaps."""
        features, queries_keys = self.backbone.stages(images)
        maps = self.classifier(features[-1]).float()
        decoded = self.decoder(features).float().softmax(dim=1)
        scores = decoded[:, 1:] / (decoded[:, 1:] + decoded[:, :1]) if options.source == "decoder" else maps.relu()
        affinities = []
        for row in range(len(images)) if keep_affinity or options.source == "affinity" else ():
            row_queries_keys = [(queries[row, None], keys[row, None]) for queries, keys in queries_keys]
            affinity = self.affinity(row_queries_keys)  # of one image at a time: n² values
            if options.source == "affinity":
                scores[row, None] = self._spread(scores[row, None], affinity)
            if keep_affinity:
                affinities.append(affinity)
        return ScoreMaps(scores, torch.cat(affinities) if affinities else None, self._logits(features[-1], None), decoded)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """cam f32[b,c,gh,gw] before the ReLU; spread f32[b,c,gh,gw], its ReLU after one propagation along the affinity;
        decoder f32[b,c,·,·], probabilities at the decoder's grid; cls_logits f32[b,c]; seg_logits f32[b,c+1,·,·]; affinity
        f32[b,n,n]; attention_logits f32[b,blocks,heads,n,n], q · k of the last blocks before scale and softmax."""
        features, queries_keys = self.backbone.stages(images)
        maps, decoded, affinity = (
            self.classifier(features[-1]).float(),
            self.decoder(features).float(),
            self.affinity(queries_keys),
        )
        return {
            "cam": maps,
            "spread": self._spread(maps.relu(), affinity),
            "decoder": decoded.softmax(dim=1)[:, 1:],
            "cls_logits": self._logits(features[-1], None),
            "seg_logits": decoded,
            "affinity": affinity,
            "attention_logits": torch.stack(
                [(queries @ keys.transpose(-1, -2)).float() for queries, keys in queries_keys], dim=1
            ),
        }

    def affinity(self, queries_keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Queries and keys [b,heads,n,width] of the last blocks → A = sigmoid(w · (S + Sᵀ) + bias) f32[b,n,n], with S the
        logits q kᵀ of all blocks' heads (section 1).

        Σ_h w_h q_h kᵀ_h is the product of the weighted queries and the keys of all heads, concatenated along their channels,
        so that the logits of single heads are never made.
        """
        head_weights = self.attn_proj.weight.flatten().split([queries.shape[1] for queries, _ in queries_keys])
        weighted = [queries * weight[:, None, None] for weight, (queries, _) in zip(head_weights, queries_keys, strict=True)]
        queries, keys = (
            torch.cat([heads.transpose(1, 2).flatten(2) for heads in blocks], dim=2)
            for blocks in (weighted, [keys for _, keys in queries_keys])
        )
        logits = (queries @ keys.transpose(1, 2)).float()
        bias = self.attn_proj.bias
        assert bias is not None
        return torch.sigmoid(logits + logits.transpose(1, 2) + bias)

    def _spread(self, scores: Tensor, affinity: Tensor) -> Tensor:
        """f32[b,c,gh,gw] after one propagation along f32[b,n,n]."""
        labels = self.params.labels
        return propagate(scores, affinity, radius=labels.radius, power=labels.power, eps=SCORE_EPS)

    def _classification(self, features: Tensor, valid: Tensor, tags: Tensor) -> Tensor:
        return F.multilabel_soft_margin_loss(self._logits(features, valid), tags)

    def _logits(self, features: Tensor, valid: Tensor | None) -> Tensor:
        """f32[b,dim,gh,gw] → f32[b,c] over the valid cells bool[b,gh,gw] (None: over all)."""
        if self.params.pool == "features":
            maxima = pooled(features, valid, pool="gmp", topk_share=1.0)
            return self.classifier(maxima[..., None, None])[..., 0, 0].float()
        return pooled(self.classifier(features).float(), valid, pool=self.params.pool, topk_share=self.params.topk_share)


def published_name(name: str) -> str:
    """Our key name → the authors'."""
    return name.replace("backbone.net.", "encoder.", 1)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours; the batch norm's counter, which inference does not read, may be missing."""
    ours = {
        f"backbone.net.{name.removeprefix('encoder.')}" if name.startswith("encoder.") else name: value
        for name, value in tensors.items()
    }
    return {"decoder.linear_fuse.bn.num_batches_tracked": torch.tensor(0)} | ours
