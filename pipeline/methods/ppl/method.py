"""PPL: a feature map is cut into a grid of patches, which run through the remaining blocks alone, beside the usual global
path.

No code is public: docs/methods/ppl.md says what is read off the paper's figures and what is ours. Shape letters: b images,
c classes, d channels, gh gw cells of the backbone's last map. A branch is a path through the blocks: number 0 is the global
path, the others are patch paths, one per position at which the map is cut.
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
from pipeline.imaging.pooling import Pool, pooled, valid_cells
from pipeline.nn import weights
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule

NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
PatchBoxes = dict[tuple[int, int], list[tuple[int, int]]]  # size (rows, columns) of patches in cells → their (top, left)


@dataclass(frozen=True)
class Params:
    """train.model.

    architecture          a network of the backbone family (vit or resnet)
    image_size            px; a ViT's position embeddings are made for this side, usually augment.size
    drop_path             largest rate of stochastic depth, 0..0.9
    mode                  plain: the global path alone, a plain CAM; single: one patch path beside it; progressive: one phase
                          per position, each with this one patch path; explicit: all patch paths at once, without gradient to
                          the blocks before their cut
    positions             the map is cut into patches after this block (ViT) or group (ResNet), from 1; in the order of the
                          phases, earliest first as published
    grid                  patches along a side
    pool                  class map → logit: gap mean of all cells (as drawn), gmp maximum, topk mean of the highest
                          topk_share
    topk_share            fraction of the cells, at least one cell; only topk uses it
    dropout               of whole channels before the classifier
    later_epochs_factor   epochs (and min_steps) of each later phase over those of the first; progressive only, as
                          the next two
    later_lr_factor       the same for the learning rate
    reset_classifier      whether each later phase starts with the classifier's initial weights
    frozen_groups         number of leading groups or blocks whose weights are frozen (PSA 1, IRN 2)
    freeze_norms          whether weight and bias of the backbone's norms are frozen
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
            raise ValueError(f"positions {list(self.positions)} names a position twice")
        count = len(self.positions)
        if not {"plain": count == 0, "single": count == 1}.get(self.mode, count > 0):
            raise ValueError(
                f"mode {self.mode} does not take {count} positions: plain takes none, single one, the others one or more"
            )


@dataclass(frozen=True)
class Options:
    """extract.options.

    shifts  number of grids that the patch paths are averaged over, each moved by 1/shifts of a patch against the one before;
            1: the grid of the training alone. More of them blur the cross that zero padding leaves at the borders of
            patches.
    paths   terms of the class map that are in the score map: both paths (as drawn), global or patch. Tag logits are of both
            always.
    """

    shifts: Positive
    paths: Literal["both", "global", "patch"]


class Method(nn.Module):
    """family: pipeline.nn.vit.backbone or pipeline.nn.resnet.backbone, whose passes can be cut (`trunk` and `rest`)."""

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        super().__init__()
        self.params, self.schedule = params, schedule
        self.backbone = family.create(params.architecture, params.image_size, drop_path=params.drop_path)
        splits = getattr(self.backbone, "splits", 0)
        if not splits:
            raise ValueError(
                f"PPL cuts a pass between blocks, which {params.architecture} cannot do: set methods.<run>.backbone to vit "
                "or resnet in params.yaml"
            )
        if out_of_range := [number for number in (*params.positions, params.frozen_groups) if number > splits]:
            raise ValueError(
                f"positions and frozen_groups of {params.architecture} go to {splits}, not to {out_of_range[0]} "
                "(edit the recipe)"
            )
        self.stride: int = self.backbone.stride
        # one 1×1 convolution per branch, whose sum is that of the published concatenation of the branches
        branches = 1 + (len(params.positions) if params.mode == "explicit" else min(1, len(params.positions)))
        self.fc8 = nn.ModuleList(nn.Conv2d(self.backbone.dim, len(labels), 1, bias=False) for _ in range(branches))
        for classifier in self.fc8.children():
            nn.init.trunc_normal_(classifier.get_parameter("weight"), std=0.02)
        for parameter in self._frozen_parameters():
            parameter.requires_grad_(False)

    def load_initial(self, family: Any, init: Path) -> None:
        """The backbone's weights; or a model.safetensors of this method, or all in the layout of ppl_state_dict.txt, where
        one fc8 reads the concatenated branches."""
        if not weights.load_whole(self, init, "fc8.0.weight") and not self._load_concatenated(init):
            family.load_initial(self.backbone, init)

    def _load_concatenated(self, init: Path) -> bool:
        """False where the file's classifier has another shape: of a network with other branches or classes."""
        if init.suffix in (weights.SCRATCH, weights.HUB):
            return False
        tensors = weights.read_weights(init)
        first, concatenated = self.fc8[0].get_parameter("weight"), tensors.pop("fc8.weight", None)
        if concatenated is None or concatenated.shape != (len(first), first.shape[1] * len(self.fc8), 1, 1):
            return False
        counters = {name: value for name, value in self.state_dict().items() if name.endswith("num_batches_tracked")}
        ours = {f"backbone.net.{name}": value for name, value in tensors.items()}
        ours |= split_classifier(concatenated, len(self.fc8))
        weights.load_exactly(
            self, counters | ours, str(init)
        )  # old files have no counters, and fixed norms do not read them
        return True

    def phases(self) -> list[Phase]:
        if self.params.mode != "progressive":
            return [self.schedule.phase(self.params.mode)]
        first, *others = (f"after_{position}" for position in self.params.positions)
        later = replace(
            self.schedule,
            epochs=self.schedule.epochs * self.params.later_epochs_factor,
            min_steps=round(self.schedule.min_steps * self.params.later_epochs_factor),
            lr=self.schedule.lr * self.params.later_lr_factor,
        )
        restart = ("fc8.",) if self.params.reset_classifier else ()
        return [self.schedule.phase(first), *(later.phase(name, restart) for name in others)]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        trained = [parameter for parameter in self.backbone.parameters() if parameter.requires_grad]
        return decayed(self.fc8.parameters(), 1.0) + decayed(trained, self.params.backbone_lr_factor)

    def _frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters of the backbone that are not trained."""
        if self.params.backbone_lr_factor == 0:
            return list(self.backbone.parameters())
        norms = [module for module in self.backbone.modules() if self.params.freeze_norms and isinstance(module, NORMS)]
        return [*self.backbone.leading(self.params.frozen_groups), *(p for norm in norms for p in norm.parameters())]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Multi-label soft margin on the pooled sum of all branches' maps: one loss (Fig. 2, 5); padding takes no part."""
        positions = self.params.positions
        if self.params.mode == "progressive":
            positions = positions[clock.phase : clock.phase + 1]
        maps = torch.stack(self.branch_maps(batch.images, positions, shifts=1)).sum(dim=0)
        valid = valid_cells(batch.valid, (maps.shape[-2], maps.shape[-1]))
        return {"classification": F.multilabel_soft_margin_loss(self._pooled(maps, valid), batch.tags)}

    @torch.no_grad()
    def score_maps(self, images: Tensor, options: Options, *, keep_affinity: bool = False) -> ScoreMaps:
        """CAM_c = ReLU(w_c · f) over the chosen branches of the last phase. Shapes as in contracts.ScoreMaps."""
        del keep_affinity  # PPL has none
        maps = torch.stack(self.branch_maps(images, self._last_positions(), options.shifts))
        chosen = {"both": maps, "global": maps[:1], "patch": maps[1:]}[options.paths]
        if not len(chosen):
            raise ValueError("mode plain has no patch path: set extract.options.paths to both in the recipe")
        return ScoreMaps(chosen.sum(dim=0).relu(), None, self._pooled(maps.sum(dim=0), None))

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """class_map f32[b,c,gh,gw] before the ReLU and its terms of the same shape: global, and after_<position> per patch
        path; logits f32[b,c]; classifier_norms f32[b,branches], the same in each row: a norm near 0 means that the path is
        ignored."""
        positions = self._last_positions()
        branches = self.branch_maps(images, positions, shifts=1)
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
        """Positions at which the trained network is cut: of a progressive one, that of its last phase."""
        return self.params.positions[-1:] if self.params.mode == "progressive" else self.params.positions

    def branch_maps(self, images: Tensor, positions: Sequence[int], shifts: int) -> list[Tensor]:
        """Class maps f32[b,c,gh,gw] of the global path, then of one patch path per position; the shared blocks run once.

        shifts: number of grids that each patch path is averaged over (Options.shifts).
        """
        *states, (last, _) = self.backbone.trunk(images, positions)
        grid = (last.shape[-2], last.shape[-1])
        masks = self._dropout_masks(last)
        maps = [self._classified(0, last, masks[0]).float()]
        for branch, (position, state) in enumerate(zip(positions, states, strict=True), start=1):
            if self.params.mode == "explicit":  # Fig. 5: the blocks below a cut learn from the global path alone
                state = tuple(None if part is None else part.detach() for part in state)
            shifted = [
                self._patch_map(
                    branch, position, state, grid, patch_boxes(grid, self.params.grid, shift / shifts), masks[branch]
                )
                for shift in range(shifts)
            ]
            maps.append(torch.stack(shifted).mean(dim=0))
        return maps

    def _patch_map(
        self, branch: int, position: int, state: Any, grid: tuple[int, int], boxes: PatchBoxes, mask: Tensor
    ) -> Tensor:
        """The backbone's state after `position`, cut into patches that run on alone → class map f32[b,c,gh,gw].

        Patches of one size are folded into the batch. The classifier, being 1×1, runs before they are put together: c
        planes, not d.
        """
        maps, before = state
        b, out = len(maps), maps.new_zeros((len(maps), self.fc8[0].get_parameter("weight").shape[0], *grid)).float()
        ratio = maps.shape[-2] // grid[0]  # cells of the state along a cell of the last map
        for (h, w), corners in boxes.items():
            cut = [maps[..., y * ratio : (y + h) * ratio, x * ratio : (x + w) * ratio] for y, x in corners]
            folded = torch.cat(cut), None if before is None else before.repeat(len(corners), 1, 1)
            scores = self._classified(branch, self.backbone.rest(folded, position), mask.repeat(len(corners), 1, 1, 1))
            for (y, x), patch in zip(corners, scores.float().split(b), strict=True):
                out[..., y : y + h, x : x + w] = patch
        return out

    def _dropout_masks(self, last: Tensor) -> list[Tensor]:
        """Per branch the mask f32[b,d,1,1] of channel dropout, drawn per image and not per patch."""
        ones = last.new_ones(len(last), last.shape[1], 1, 1)
        return [F.dropout2d(ones, self.params.dropout, self.training) for _ in self.fc8]

    def _classified(self, branch: int, features: Tensor, mask: Tensor) -> Tensor:
        return self.fc8[branch](features * mask if self.training and self.params.dropout else features)

    def _pooled(self, maps: Tensor, valid: Tensor | None) -> Tensor:
        return pooled(maps, valid, pool=self.params.pool, topk_share=self.params.topk_share)


def borders(cells: int, patches: int, shift: float) -> list[int]:
    """Cell indices 0..cells at which a side is cut into patches, both ends included.

    shift: 0..1 of a patch; above 0 there is one patch more, and the outer ones are smaller. Patches of 0 cells are left out.
    """
    inner = (int((number + shift) * cells / patches) for number in range(patches))
    return sorted({0, *inner, cells})


def patch_boxes(grid: tuple[int, int], patches: int, shift: float) -> PatchBoxes:
    """Patches of a grid (rows, columns) in cells, each cell in exactly one, grouped by size.

    Without shift there is one size where `patches` divides both sides, else up to four. Nothing is padded, so that no patch
    contains cells outside the image.
    """
    rows, columns = (list(pairwise(borders(side, patches, shift))) for side in grid)
    boxes: PatchBoxes = {}
    for top, bottom in rows:
        for left, right in columns:
            boxes.setdefault((bottom - top, right - left), []).append((top, left))
    return boxes


def split_classifier(weight: Tensor, branches: int) -> dict[str, Tensor]:
    """Classifier f32[c,branches*d,1,1] of the concatenated branches, global first → our names, and f32[c,d,1,1] per
    branch."""
    return {f"fc8.{branch}.weight": part for branch, part in enumerate(weight.chunk(branches, dim=1))}
