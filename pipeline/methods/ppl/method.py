"""PPL: the last blocks also run on each cell of a grid by itself, so that every part of an object must show its class.

Nobody published a program: docs/methods/ppl.md says what is read off the paper's figures and what is ours. Shape letters: b images,
c classes, d channels, gh gw cells of the backbone's last map. A branch is one path through the blocks: number 0 is the global one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.config import Count, NonNegative, Positive
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, ScoreMaps
from pipeline.core.labels import LabelSpace
from pipeline.imaging.pooling import Pool, pooled
from pipeline.nn import weights
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
Boxes = dict[tuple[int, int], list[tuple[int, int]]]  # size (rows, columns) of pieces → their (top, left)


@dataclass(frozen=True)
class Params:
    """train.<m>.model.

    architecture          a name of the backbone family (vit or resnet)
    image_size            px; grid of a ViT's position embeddings, usually augment.size
    drop_path             stochastic depth
    mode                  plain: the global path alone, a plain CAM; single: one patch path beside it; progressive: one phase per
                          position, each with this one patch path; explicit: all patch paths at once, cut off from the blocks below
    positions             the map is cut into patches after this block (ViT) or group (ResNet), from 1; in the order of the phases,
                          earliest first as published
    grid                  patches along a side
    pool, topk_share      cells → image: gap mean of all (as drawn), gmp maximum, topk mean of the highest topk_share
    dropout               of whole channels before the classifier
    later_epochs_factor   epochs of each later phase over those of the first; progressive only, as the next two
    later_lr_factor       the same for the learning rate
    reset_classifier      whether each later phase starts with the classifier's first weights
    frozen_groups         so many first groups or blocks learn nothing (PSA 1, IRN 2)
    freeze_norms          the backbone's norms keep weight and bias
    backbone_lr_factor    learning rate of the backbone over the classifier's; 0 freezes it
    """

    architecture: str
    image_size: Positive
    drop_path: Annotated[float, Field(ge=0, le=0.9)]
    mode: Literal["plain", "single", "progressive", "explicit"]
    positions: tuple[Positive, ...]
    grid: Positive
    pool: Pool
    topk_share: Annotated[float, Field(gt=0, le=1)]
    dropout: Annotated[float, Field(ge=0, le=0.9)]
    later_epochs_factor: NonNegative
    later_lr_factor: Annotated[float, Field(gt=0, le=1)]
    reset_classifier: bool
    frozen_groups: Count
    freeze_norms: bool
    backbone_lr_factor: NonNegative

    def __post_init__(self) -> None:
        if len(set(self.positions)) != len(self.positions):
            raise ValueError(f"positions {list(self.positions)} has one twice")
        count = len(self.positions)
        if not {"plain": count == 0, "single": count == 1}.get(self.mode, count > 0):
            raise ValueError(
                f"mode {self.mode} does not take {count} positions: plain takes none, single one, the others one or more"
            )


@dataclass(frozen=True)
class Options:
    """extract.<m>.options.

    shifts  grids to average the patch paths over, each moved by 1/shifts of a patch against the one before; 1: the grid of the
            training alone. More blur the cross that zero padding leaves at the borders of patches.
    paths   both (as drawn), or the share of one in the score map. The tags are judged by both in any case.
    """

    shifts: Positive
    paths: Literal["both", "global", "patch"]


class Method(nn.Module):
    """family: pipeline.nn.vit.backbone or pipeline.nn.resnet.backbone: whatever has `trunk` and `rest`."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        splits = getattr(self.backbone, "splits", 0)
        if not splits:
            raise ValueError(
                f"PPL cuts a pass between blocks, which {params.architecture} does not let it: set methods.<m>.backbone to vit or "
                "resnet in params.yaml"
            )
        if beyond := [number for number in (*params.positions, params.frozen_groups) if number > splits]:
            raise ValueError(
                f"positions and frozen_groups of {params.architecture} go to {splits}, not to {beyond[0]} (edit params.yaml)"
            )
        self.stride: int = self.backbone.stride
        # one 1×1 convolution per branch, whose sum is that of the published concatenation of the branches
        branches = 1 + (len(params.positions) if params.mode == "explicit" else min(1, len(params.positions)))
        self.fc8 = nn.ModuleList(nn.Conv2d(self.backbone.dim, len(labels), 1, bias=False) for _ in range(branches))
        for classifier in self.fc8.children():
            nn.init.trunc_normal_(classifier.get_parameter("weight"), std=0.02)
        for parameter in self._fixed():
            parameter.requires_grad_(False)

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; or a model.safetensors of this method, or all in the layout of ppl_state_dict.txt, where one
        fc8 reads the concatenated branches."""
        if not weights.load_whole(self, init, "fc8.0.weight") and not self._load_concatenated(init):
            family.load_initial(self.backbone, init)

    def _load_concatenated(self, init: Path) -> bool:
        """False where the classifier of the file is another: of a plain network, or of other classes."""
        if init.suffix in (weights.SCRATCH, weights.HUB):
            return False
        tensors = weights.read_weights(init)
        first, given = self.fc8[0].get_parameter("weight"), tensors.pop("fc8.weight", None)
        if given is None or given.shape != (len(first), first.shape[1] * len(self.fc8), 1, 1):
            return False
        counters = {name: value for name, value in self.state_dict().items() if name.endswith("num_batches_tracked")}
        found = {f"backbone.net.{name}": value for name, value in tensors.items()} | split_classifier(given, len(self.fc8))
        weights.load_exactly(self, counters | found, str(init))  # old files have no counters, and nobody reads them
        return True

    def phases(self) -> list[Phase]:
        if self.params.mode != "progressive":
            return [self.schedule.phase(self.params.mode)]
        first, *others = (f"after_{position}" for position in self.params.positions)
        later = replace(
            self.schedule,
            epochs=self.schedule.epochs * self.params.later_epochs_factor,
            lr=self.schedule.lr * self.params.later_lr_factor,
        )
        restart = ("fc8.",) if self.params.reset_classifier else ()
        return [self.schedule.phase(first), *(later.phase(name, restart) for name in others)]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return decayed(self.fc8.parameters(), 1.0) + decayed(trained, self.params.backbone_lr_factor)

    def _fixed(self) -> list[nn.Parameter]:
        """What of the backbone learns nothing."""
        if self.params.backbone_lr_factor == 0:
            return list(self.backbone.parameters())
        norms = [module for module in self.backbone.modules() if self.params.freeze_norms and isinstance(module, NORMS)]
        return [*self.backbone.leading(self.params.frozen_groups), *(p for norm in norms for p in norm.parameters())]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Multi-label soft margin on the pooled sum of all branches' maps: one loss (Fig. 2, 5); padding takes no part."""
        positions = self.params.positions
        if self.params.mode == "progressive":
            positions = positions[clock.phase : clock.phase + 1]
        maps = torch.stack(self._branches(batch.images, positions, shifts=1)).sum(dim=0)
        seen = F.adaptive_max_pool2d(batch.valid[:, None].float(), maps.shape[-2:])[:, 0] > 0
        return {"classification": F.multilabel_soft_margin_loss(self._pooled(maps, seen), batch.tags)}

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """CAM_c = ReLU(w_c · f) over the chosen branches of the last phase. Shapes as in contracts.ScoreMaps."""
        del keep_affinity  # it has none
        maps = torch.stack(self._branches(images, self._last_positions(), options.shifts))
        chosen = {"both": maps, "global": maps[:1], "patch": maps[1:]}[options.paths]
        if not len(chosen):
            raise ValueError("mode plain has no patch path: set extract.<m>.options.paths to both in params.yaml")
        return ScoreMaps(chosen.sum(dim=0).relu(), None, self._pooled(maps.sum(dim=0), None))

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """class_map f32[b,c,gh,gw] before the ReLU and its summands: global and one after_<position> per patch path; logits
        f32[b,c]; classifier_norms f32[b,branches], the same in each row, to tell whether a path is ignored."""
        positions = self._last_positions()
        branches = self._branches(images, positions, shifts=1)
        maps = torch.stack(branches).sum(dim=0)
        names = ("global", *(f"after_{position}" for position in positions))
        norms = torch.stack([classifier.get_parameter("weight").norm() for classifier in self.fc8.children()])
        return {
            "class_map": maps,
            **dict(zip(names, branches, strict=True)),
            "logits": self._pooled(maps, None),
            "classifier_norms": norms.expand(len(images), -1),
        }

    def _last_positions(self) -> tuple[int, ...]:
        """Where the trained network is cut: a progressive one where its last phase was."""
        return self.params.positions[-1:] if self.params.mode == "progressive" else self.params.positions

    def _branches(self, images: Tensor, positions: Sequence[int], shifts: int) -> list[Tensor]:
        """Class maps f32[b,c,gh,gw] of the global path and of one patch path per position; the shared blocks run once."""
        *states, (last, _) = self.backbone.trunk(images, positions)
        grid = (last.shape[-2], last.shape[-1])
        kept = self._kept_channels(last)
        maps = [self._classified(0, last, kept[0]).float()]
        for branch, (position, state) in enumerate(zip(positions, states, strict=True), start=1):
            if self.params.mode == "explicit":  # Fig. 5: the blocks below a cut learn from the global path alone
                state = tuple(None if part is None else part.detach() for part in state)
            shifted = [
                self._patched(branch, position, state, grid, pieces(grid, self.params.grid, shift / shifts), kept[branch])
                for shift in range(shifts)
            ]
            maps.append(torch.stack(shifted).mean(dim=0))
        return maps

    def _patched(self, branch: int, position: int, state: Any, grid: tuple[int, int], boxes: Boxes, kept: Tensor) -> Tensor:
        """A state after `position`, cut into pieces that run on by themselves, as many as have one size folded into the batch
        → class maps f32[b,c,gh,gw]. The classifier, being 1×1, runs before they are put together: c planes, not d."""
        maps, before = state
        b, out = len(maps), maps.new_zeros((len(maps), self.fc8[0].get_parameter("weight").shape[0], *grid)).float()
        ratio = maps.shape[-2] // grid[0]  # cells of the state along a cell of the last map
        for (h, w), corners in boxes.items():
            cut = [maps[..., y * ratio : (y + h) * ratio, x * ratio : (x + w) * ratio] for y, x in corners]
            folded = torch.cat(cut), None if before is None else before.repeat(len(corners), 1, 1)
            scores = self._classified(branch, self.backbone.rest(folded, position), kept.repeat(len(corners), 1, 1, 1))
            for (y, x), piece in zip(corners, scores.float().split(b), strict=True):
                out[..., y : y + h, x : x + w] = piece
        return out

    def _kept_channels(self, last: Tensor) -> list[Tensor]:
        """Per branch f32[b,d,1,1] that the features are multiplied by: dropout is drawn per image, not per patch."""
        ones = last.new_ones(len(last), last.shape[1], 1, 1)
        return [F.dropout2d(ones, self.params.dropout, self.training) for _ in self.fc8]

    def _classified(self, branch: int, features: Tensor, kept: Tensor) -> Tensor:
        return self.fc8[branch](features * kept if self.training and self.params.dropout else features)

    def _pooled(self, maps: Tensor, seen: Tensor | None) -> Tensor:
        return pooled(maps, seen, pool=self.params.pool, topk_share=self.params.topk_share)


def borders(cells: int, patches: int, shift: float) -> list[int]:
    """Where a side of so many cells is cut, its ends included. shift: 0 … 1 of a patch; above 0 there is one patch more, and the
    outer ones are smaller. Patches of 0 cells are left out."""
    inner = (int((number + shift) * cells / patches) for number in range(patches))
    return sorted({0, *inner, cells})


def pieces(grid: tuple[int, int], patches: int, shift: float) -> Boxes:
    """The cells of a grid, each in exactly one piece, grouped by size: one group where `patches` divides both sides, else up to
    four. Nothing is padded, so no piece sees cells that are not there."""
    rows, columns = (list(pairwise(borders(side, patches, shift))) for side in grid)
    found: Boxes = {}
    for top, bottom in rows:
        for left, right in columns:
            found.setdefault((bottom - top, right - left), []).append((top, left))
    return found


def split_classifier(weight: Tensor, branches: int) -> dict[str, Tensor]:
    """f32[c,branches*d,1,1], which reads concatenated branches, global first → our names and shares."""
    return {f"fc8.{number}.weight": share for number, share in enumerate(weight.chunk(branches, dim=1))}
