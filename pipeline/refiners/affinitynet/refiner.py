"""AffinityNet (PSA, Ahn & Kwak 2018): a network learns from confident labels how alike neighbours are; score maps walk along
it.

fit_refiner makes the labels by two dense CRFs and trains Network in the common loop; docs/refiners.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.core.config import AboveZero, NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ImageMaps, ParamGroup, Phase
from pipeline.crf import CrfSettings, dense_crf, unary_from_probabilities
from pipeline.imaging import pairs, planes, transforms
from pipeline.imaging.affinity import pair_walk
from pipeline.imaging.threshold import fit_threshold as fit
from pipeline.nn.weights import load_exactly, unwrapped
from pipeline.training.optim import decayed
from pipeline.training.settings import LearnedFit, Schedule

__all__ = ["FitParams", "Network", "Params", "Refiner", "fit", "training_labels"]

Power = Annotated[float, Field(gt=0, le=128)]


@dataclass(frozen=True)
class Labels:
    """Labels that the network learns from (PSA, section 3.2): a class where one wins against the background of the low
    power, background where none wins against that of the high power, 255 elsewhere.

    powers  low and high power of the background's score 1 - best class (PSA: 4 and 32; SEAM: 4 and 24)
    crf     refines the labels of both
    """

    powers: tuple[Power, Power]
    crf: CrfSettings

    def __post_init__(self) -> None:
        if self.powers[0] >= self.powers[1]:
            raise ValueError(f"powers: got {list(self.powers)}, allowed is [low, high] with low < high")


@dataclass(frozen=True)
class Model:
    """The network that learns affinities.

    architecture  a network of the run's backbone family
    image_size    px; a ViT's position embeddings are made for this side
    stride   px per cell of the affinities' grid
    widths   channels into which each of the last len(widths) feature maps is turned (PSA: 64, 128, 256)
    radius   cells; pairs nearer than it are learned (PSA: 5)
    backbone_lr_factor  learning rate of the backbone over that of the new layers (PSA: 0.1); 0 freezes it
    """

    architecture: str
    image_size: Positive
    stride: Positive
    widths: tuple[Positive, ...]
    radius: Annotated[int, Field(ge=2, le=32)]
    backbone_lr_factor: NonNegative


@dataclass(frozen=True)
class FitParams(LearnedFit):
    """Section fit_refiner: beside the threshold and the training, the labels that the network learns from, and the
    network."""

    labels: Labels
    model: Model


@dataclass(frozen=True)
class Params:
    """refine.options.

    power      of the background plane 1 - best score (PSA: 16); null: a plane of the run's threshold
    beta       power of the affinities (PSA: 8)
    steps      of the walk (PSA: 256)
    long_side  px; larger images are seen, and walked, scaled down to it
    """

    power: Power | None
    beta: AboveZero
    steps: Positive
    long_side: Positive


PUBLISHED_SCHEDULE = Schedule(
    epochs=8, min_steps=0, batch_size=8, shards=1, lr=0.1, weight_decay=5e-4, optimiser="sgd", schedule="poly",
    warmup=0, lr_floor=0.0
)  # fmt: skip
PUBLISHED_MODEL = Model("resnet38d", 448, 8, (64, 128, 256), 5, 0.1)


def training_labels(params: FitParams, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
    """u8[h,w] mask values, 255 where the two refined backgrounds disagree (PSA, section 3.2). The threshold is not used."""
    del threshold
    if not len(maps.classes):
        return np.zeros(maps.size, np.uint8)
    scores = planes.upsample(maps.scores, maps.size)
    rest = np.clip(1 - scores.max(axis=0, keepdims=True), 0, 1)
    high, low = (
        planes.labels_of(
            dense_crf(image, unary_from_probabilities(np.concatenate([rest**power, scores])), params.labels.crf),
            maps.classes,
        )
        for power in params.labels.powers
    )
    return planes.trinary_labels(low, high)


class Network(nn.Module):
    """Trainable. family: a module of pipeline/nn."""

    def __init__(self, model: Model, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = model, schedule
        self.backbone = family.create(model.architecture, model.image_size, drop_path=0.0)
        dims = self.backbone.dims[-len(model.widths) :]
        if len(dims) < len(model.widths):
            raise ValueError(
                f"widths: got {list(model.widths)}, but {model.architecture} has only {len(dims)} feature maps (edit "
                "fit_refiner.model in the recipe)"
            )
        taken = [nn.Conv2d(dim, width, 1, bias=False) for dim, width in zip(dims, model.widths, strict=True)]
        self.taken = nn.ModuleList(taken)
        self.joined = nn.Conv2d(sum(model.widths), sum(model.widths), 1, bias=False)
        for layer in taken:
            nn.init.kaiming_normal_(layer.weight)
        nn.init.xavier_uniform_(self.joined.weight, gain=4)
        if model.backbone_lr_factor == 0:
            self.backbone.requires_grad_(False)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Network:
        """The authors' ResNet38 AffinityNet (f8_3 … f9) → a network with the published settings. ValueError lists keys that
        miss, are unknown, or do not fit."""
        new = {f"f8_{3 + tap}.weight": f"taken.{tap}.weight" for tap in range(3)} | {"f9.weight": "joined.weight"}
        given = {new.get(name, f"backbone.net.{name}"): value for name, value in unwrapped(state_dict).items()}
        made = cls(PUBLISHED_MODEL, PUBLISHED_SCHEDULE, plugins.load("nn", "resnet"))
        back = {ours: theirs for theirs, ours in new.items()}
        load_exactly(made, given, "this state dict", spoken=lambda name: back.get(name, name.removeprefix("backbone.net.")))
        return made.eval()

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; the new layers start at random."""
        family.load_initial(self.backbone, init)

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("affinity")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        new = [*self.taken.parameters(), *self.joined.parameters()]
        return decayed(new, 1.0) + decayed(self.backbone.parameters(), self.params.backbone_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """How badly pairs of known cells are told apart (PSA, eq. 6); pixels of 255 and padding are in no pair."""
        del clock
        assert batch.masks is not None and batch.on_host.masks is not None  # the loop was given labels
        features = self.features(batch.images).float()
        values = pairs.values_in(batch.on_host.masks).to(features.device, non_blocking=True)
        labels = pairs.pooled_labels(batch.masks, batch.valid, (features.shape[-2], features.shape[-1]), values)
        near = pairs.offsets(self.params.radius)
        return {
            "affinity": pairs.pair_loss(
                (pairs.feature_affinity(features, offset) for offset in near),
                (pairs.kinds(labels, offset) for offset in near),
            )
        }

    def features(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of the backbone's stride → f32[b,d,h/stride,w/stride]."""
        grid = images.shape[-2] // self.params.stride, images.shape[-1] // self.params.stride
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.params.backbone_lr_factor > 0):
            maps = self.backbone.feature_maps(images)[-len(self.taken) :]
        branches = [F.elu(layer(feature_map)) for layer, feature_map in zip(self.taken, maps, strict=True)]
        return F.elu(self.joined(torch.cat([_at(branch, grid) for branch in branches], dim=1)))


def _at(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return maps if maps.shape[-2:] == grid else F.interpolate(maps, grid, mode="bilinear", align_corners=False)


class Refiner:
    """network: the trained Network, on its device."""

    def __init__(self, params: Params, state: Mapping[str, np.ndarray], network: Network) -> None:
        del state
        self.params, self.network = params, network
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background (PSA, section 3.3)."""
        model = self.network.params
        step = max(model.stride, self.network.backbone.stride)
        size = transforms.view_size(maps.size, 1.0, step, self.params.long_side)
        pixels = transforms.tensor_of(transforms.resize(image, size), self.device)[None]
        features = self.network.features(pixels)
        near = pairs.offsets(model.radius)
        affinities = [pairs.feature_affinity(features, offset)[0] for offset in near]
        scores = torch.from_numpy(maps.scores).to(self.device)
        rest = (1 - scores.amax(dim=0, keepdim=True)).clamp(0, 1)
        background = torch.full_like(rest, threshold) if self.params.power is None else rest**self.params.power
        pooled = _pooled(torch.cat([background, scores]), (features.shape[-2], features.shape[-1]))
        walked = pair_walk(pooled, affinities, near, beta=self.params.beta, steps=self.params.steps)
        full = F.interpolate(walked[None], maps.size, mode="bilinear", align_corners=False)[0]
        return _probabilities(full).cpu().numpy()


def _pooled(planes: Tensor, grid: Sequence[int]) -> Tensor:
    """Planes f32[k,·,·] on the affinities' grid: means where it is coarser (PSA), else bilinear."""
    if planes.shape[-2] >= grid[0] and planes.shape[-1] >= grid[1]:
        return F.adaptive_avg_pool2d(planes, (grid[0], grid[1]))
    return F.interpolate(planes[None], tuple(grid), mode="bilinear", align_corners=False)[0]


def _probabilities(full: Tensor) -> Tensor:
    """Planes ≥ 0, background in front → probabilities that sum to 1; background where all are 0."""
    total = full.sum(dim=0)
    full[0][total <= 0] = 1
    return full / full.sum(dim=0)
