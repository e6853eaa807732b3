"""IRN (Ahn, Cho & Kwak 2019): a network learns where classes meet from confident labels; score maps walk, but not across.

fit_refiner makes the labels by two dense CRFs and trains Network in the common loop; docs/refiners.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.core.config import AboveZero, NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ImageMaps, ParamGroup, Phase
from pipeline.crf import CrfSettings, dense_crf, unary_from_labels
from pipeline.imaging import pairs, planes, transforms
from pipeline.imaging.affinity import edge_walk
from pipeline.imaging.threshold import fit_threshold as fit
from pipeline.nn.weights import load_exactly, unwrapped
from pipeline.training.optim import decayed
from pipeline.training.settings import LearnedFit, Schedule

__all__ = ["FitParams", "Network", "Params", "Refiner", "fit", "training_labels"]

EDGE_WIDTH, EDGE_GROUPS = 32, 4
FINE_WIDTHS, COARSE_WIDTH = (64, 128), 256  # of the displacement branch
FINE_GROUPS, COARSE_GROUPS = (8, 16), 16


@dataclass(frozen=True)
class Labels:
    """Labels that the network learns from: after a CRF, a class where one wins at the high threshold, background where none
    wins at the low one, 255 elsewhere.

    factors   low and high threshold, as factors of the run's own. IRN: threshold 0.15, factors 1/3 and 2
    gt_prob   of the labels that both CRFs start from
    crf       of both
    """

    factors: tuple[AboveZero, AboveZero]
    gt_prob: Annotated[float, Field(ge=0.5, le=0.999)]
    crf: CrfSettings

    def __post_init__(self) -> None:
        if self.factors[0] >= self.factors[1]:
            raise ValueError(f"factors: got {list(self.factors)}, allowed is [low, high] with low < high")


@dataclass(frozen=True)
class Model:
    """The network that learns boundaries.

    architecture  a network of the run's backbone family, which stays as it is
    image_size    px; a ViT's position embeddings are made for this side
    stride  px per cell of the edge map (IRN: 4)
    radius  cells; pairs nearer than it are learned (IRN: 10)
    displacement_weight     loss of the branch that points to each object's centre (IRN: 1, for instances, which are not made
                here); 0 leaves the branch out
    displacement_lr_factor  learning rate of that branch over the edges' (IRN: 10)
    """

    architecture: str
    image_size: Positive
    stride: Positive
    radius: Annotated[int, Field(ge=2, le=32)]
    displacement_weight: NonNegative
    displacement_lr_factor: NonNegative


@dataclass(frozen=True)
class FitParams(LearnedFit):
    """Section fit_refiner: beside the threshold and the training, the labels that the network learns from, and the
    network."""

    labels: Labels
    model: Model


@dataclass(frozen=True)
class Params:
    """refine.options.

    radius     cells that one step reaches (IRN: 5)
    beta       power of the affinities (IRN: 10)
    steps      of the walk (IRN: 256)
    flip       whether the edges of the mirror image are averaged in (IRN: true)
    normalise  walked scores over the maximum of all classes of the image (IRN), or each over its own
    threshold  score of background after the walk (IRN: 0.25); null: the run's own threshold
    long_side  px; larger images are seen, and walked, scaled down to it
    """

    radius: Annotated[int, Field(ge=2, le=32)]
    beta: AboveZero
    steps: Positive
    flip: bool
    normalise: Literal["image", "class"]
    threshold: Annotated[float, Field(gt=0, le=1)] | None
    long_side: Positive


PUBLISHED_SCHEDULE = Schedule(
    epochs=3, min_steps=0, batch_size=32, shards=1, lr=0.1, weight_decay=1e-4, optimiser="sgd", schedule="poly",
    warmup=0, lr_floor=0.0
)  # fmt: skip
PUBLISHED_MODEL = Model("resnet50", 512, 4, 10, 1.0, 10.0)


def training_labels(params: FitParams, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
    """u8[h,w] mask values, 255 where a class wins at the low threshold alone (IRN, section 5.1)."""
    if not len(maps.classes):
        return np.zeros(maps.size, np.uint8)
    scores, settings = planes.upsample(maps.scores, maps.size), params.labels
    low, high = (
        planes.labels_of(
            dense_crf(
                image,
                unary_from_labels(
                    planes.with_background(scores, threshold * factor).argmax(axis=0),
                    len(scores) + 1,
                    gt_prob=settings.gt_prob,
                ),
                settings.crf,
            ),
            maps.classes,
        )
        for factor in settings.factors
    )
    return planes.trinary_labels(low, high)


def branch(channels: int, width: int, groups: int) -> nn.Sequential:
    """1×1 convolution and group norm."""
    return nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.GroupNorm(groups, width))


def at(layers: nn.Module, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """A branch's maps, enlarged to `grid` before the ReLU, as published."""
    features = layers(maps)
    if features.shape[-2:] != grid:
        features = F.interpolate(features, grid, mode="bilinear", align_corners=False)
    return features.relu()


class Displacement(nn.Module):
    """Feature maps, finest first → f32[b,2,gh,gw], (dy, dx) in cells of each cell to its object's centre."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.fine_taps = len(dims) // 2
        fine, coarse = dims[: self.fine_taps], dims[self.fine_taps :]
        self.fine = nn.ModuleList(
            branch(dim, FINE_WIDTHS[min(tap, 1)], FINE_GROUPS[min(tap, 1)]) for tap, dim in enumerate(fine)
        )
        self.coarse = nn.ModuleList(branch(dim, COARSE_WIDTH, COARSE_GROUPS) for dim in coarse)
        self.middle = branch(COARSE_WIDTH * len(coarse), COARSE_WIDTH, COARSE_GROUPS)
        widths = sum(FINE_WIDTHS[min(tap, 1)] for tap in range(len(fine)))
        self.last = branch(widths + COARSE_WIDTH, COARSE_WIDTH, COARSE_GROUPS)
        self.out = nn.Conv2d(COARSE_WIDTH, 2, 1, bias=False)

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        half = (grid[0] + 1) // 2, (grid[1] + 1) // 2
        fine = [at(layers, feature_map, grid) for layers, feature_map in zip(self.fine, maps[: self.fine_taps], strict=True)]
        coarse = [
            at(layers, feature_map, half) for layers, feature_map in zip(self.coarse, maps[self.fine_taps :], strict=True)
        ]
        fine.append(at(self.middle, torch.cat(coarse, dim=1), grid))
        return self.out(at(self.last, torch.cat(fine, dim=1), grid))


class Network(nn.Module):
    """Trainable. family: a module of pipeline/nn."""

    def __init__(self, model: Model, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = model, schedule
        self.backbone = family.create(model.architecture, model.image_size, drop_path=0.0).requires_grad_(False)
        dims = self.backbone.dims
        self.edges = nn.ModuleList(branch(dim, EDGE_WIDTH, EDGE_GROUPS) for dim in dims)
        self.edge = nn.Conv2d(EDGE_WIDTH * len(dims), 1, 1)
        self.displacement = Displacement(dims) if model.displacement_weight > 0 else None

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any]) -> Network:
        """The authors' IRNet (stage1 …, fc_edge*, fc_dp*) → a network with the published settings; aliases of one tensor,
        path indices and the instances' mean_shift are dropped. ValueError lists keys that miss, are unknown, or do not
        fit."""
        made = cls(PUBLISHED_MODEL, PUBLISHED_SCHEDULE, plugins.load("nn", "resnet"))
        load_exactly(made, renamed(unwrapped(state_dict)), "this state dict")
        return made.eval()

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights, which stay; the branches start at random."""
        family.load_initial(self.backbone, init)

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        self.backbone.eval()
        return self

    def phases(self) -> list[Phase]:
        return [self.schedule.phase("edges")]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        moved = [] if self.displacement is None else list(self.displacement.parameters())
        new = [*self.edges.parameters(), *self.edge.parameters()]
        return decayed(new, 1.0) + decayed(moved, self.params.displacement_lr_factor)

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """How badly pairs of known cells are told apart by the edges between them (IRN, eq. 8), and how badly displacements
        tell them (eq. 5 and 6), half each as published; pixels of 255 and padding are in no pair."""
        del clock
        assert batch.masks is not None  # the loop was given labels
        maps, grid = self._maps(batch.images)
        edge = torch.sigmoid(self._edge(maps, grid).float())
        step = self.params.stride
        labels = batch.masks[:, step // 2 :: step, step // 2 :: step][:, : grid[0], : grid[1]]
        near = pairs.offsets(self.params.radius)
        kinds = [pairs.kinds(labels, offset) for offset in near]
        losses = {"edges": pairs.pair_loss(pairs.edge_affinities(edge, near), kinds) / 2}
        if self.displacement is not None:
            moved = pairs.displacement_loss(self.displacement(maps, grid).float(), kinds, near)
            losses["displacement"] = self.params.displacement_weight * moved / 2
        return losses

    def edge_logits(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of the backbone's stride → f32[b,h/stride,w/stride]."""
        maps, grid = self._maps(images)
        return self._edge(maps, grid)

    def _maps(self, images: Tensor) -> tuple[list[Tensor], tuple[int, int]]:
        with torch.no_grad():
            maps = self.backbone.feature_maps(images)
        return maps, (images.shape[-2] // self.params.stride, images.shape[-1] // self.params.stride)

    def _edge(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        return self.edge(
            torch.cat([at(layers, feature_map, grid) for layers, feature_map in zip(self.edges, maps, strict=True)], dim=1)
        )[:, 0]


class Refiner:
    """network: the trained Network, on its device."""

    def __init__(self, params: Params, state: Mapping[str, np.ndarray], network: Network) -> None:
        del state
        self.params, self.network = params, network
        self.device = next(network.parameters()).device

    @torch.no_grad()
    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background (IRN, section 5.3)."""
        step = max(self.network.params.stride, self.network.backbone.stride)
        size = transforms.view_size(maps.size, 1.0, step, self.params.long_side)
        pixels = transforms.tensor_of(transforms.resize(image, size), self.device)[None]
        logits = self.network.edge_logits(torch.cat([pixels, pixels.flip(-1)]) if self.params.flip else pixels)
        mean = (logits[0] + logits[1].flip(-1)) / 2 if self.params.flip else logits[0]
        edge = torch.sigmoid(mean.float())
        scores = torch.from_numpy(maps.scores).to(self.device)
        enlarged = F.interpolate(scores[None], edge.shape, mode="bilinear", align_corners=False)[0]
        walked = edge_walk(enlarged, edge, radius=self.params.radius, beta=self.params.beta, steps=self.params.steps)
        full = F.interpolate(walked[None], maps.size, mode="bilinear", align_corners=False)[0]
        most = full.amax() if self.params.normalise == "image" else full.amax(dim=(1, 2), keepdim=True)
        background = torch.full_like(full[:1], threshold if self.params.threshold is None else self.params.threshold)
        stacked = torch.cat([background, full / most.clamp(min=1e-5)])
        return (stacked / stacked.sum(dim=0)).cpu().numpy()


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' key names → ours. Their stages hold torchvision's layers: stage1 the stem (0 conv1, 1 bn1), stage2 to
    stage5 layer1 to layer4; resnet50.* and backbone.* repeat them."""
    tensors_of_ours: dict[str, Tensor] = {}
    branches = {f"fc_edge{tap}": f"edges.{tap - 1}" for tap in range(1, 6)}
    branches |= {f"fc_dp{tap}": f"displacement.fine.{tap - 1}" for tap in (1, 2)}
    branches |= {f"fc_dp{tap}": f"displacement.coarse.{tap - 3}" for tap in (3, 4, 5)}
    branches |= {"fc_dp6": "displacement.middle", "fc_dp7": "displacement.last"}
    for name, value in tensors.items():
        first, _, rest = name.partition(".")
        if first == "resnet50" and not rest.startswith("fc."):
            tensors_of_ours[f"backbone.net.{rest}"] = value
        elif name == "fc_dp7.3.weight":
            tensors_of_ours["displacement.out.weight"] = value
        elif first in branches and rest.split(".")[0] in ("0", "1"):
            tensors_of_ours[f"{branches[first]}.{rest}"] = value
        elif first == "fc_edge6":
            tensors_of_ours[f"edge.{rest}"] = value
    return tensors_of_ours
