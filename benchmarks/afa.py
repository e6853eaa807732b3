"""One AFA training step against the same step with every pass and every label made always. Each variant runs in a process of its own.

`python -m benchmarks.afa VARIANT` prints seconds and MiB as JSON; benchmarks/run.py sets pairs of variants side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Memory, Timing, main_of, pair, photograph
from pipeline.core import plugins
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.imaging import pseudo_labels, transforms
from pipeline.imaging.scoremaps import merge_views
from pipeline.methods.afa import method as afa
from pipeline.training.settings import Schedule

NAME = "benchmarks.afa"
CLASSES, BATCH, SIZE = 20, 2, 320
CLOCKS = {"warm-up": Clock(0, 0, 100), "labelled": Clock(0, 15, 100), "spread": Clock(0, 60, 100)}


class Always(afa.Method):
    """The reference: all views with decoder and single heads' logits, both kinds of labels at both levels one by one, at each step."""

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        made = self.training_labels(batch, spread=clock.reached(self.params.aff_iters))
        counted = Clock(clock.phase, clock.steps, clock.steps)
        self.labels_made = made
        found = super().losses(batch, counted)
        return found if clock.reached(self.params.cam_iters) else {"classification": found["classification"]}

    def training_labels(self, batch: Batch, *, spread: bool) -> tuple[Tensor, Tensor]:
        if hasattr(self, "labels_made"):
            made = self.labels_made
            del self.labels_made
            return made
        with torch.no_grad():
            return self._all_labels(batch, spread)

    def _all_labels(self, batch: Batch, spread: bool) -> tuple[Tensor, Tensor]:
        views, affinity, settings = [], None, self.params.labels
        size = (batch.images.shape[-2], batch.images.shape[-1])
        with self._labelling():
            for scale in sorted(self.params.cam_scales, reverse=True):
                at = transforms.view_size(size, scale, self.stride)
                view = F.interpolate(batch.images, at, mode="bilinear", align_corners=False)
                features, asked = self.backbone.stages(torch.cat([view, view.flip(-1)]))
                self.decoder(features)
                of_view = self._affinity(asked)[: len(view)]
                affinity = of_view if affinity is None else affinity
                views.append(torch.stack(self.classifier(features[-1]).chunk(2), dim=1))
        assert affinity is not None
        targets, pair_targets = [], []
        for row, tags in enumerate(batch.tags):
            classes = torch.nonzero(tags).flatten()
            scores = merge_views([view[row][:, classes] for view in views], rule="afa", size=size)
            walked = pseudo_labels.spread_planes(scores, affinity[row], views[0].shape[-2:], settings)
            window = afa._window(batch.valid[row])
            plain = pseudo_labels.plain_planes(scores, settings)
            kinds = []
            for planes in (plain, walked):  # each level by itself, as if it were both
                each = [planes[level : level + 1].expand(2, -1, -1, -1) for level in (0, 1)]
                low, high = (
                    pseudo_labels.refined_labels(batch.images[row], [one], classes, window, settings)[0] for one in each
                )
                kinds.append(pseudo_labels.trinary_labels(low, high))
            targets.append(kinds[spread])
            pair_targets.append(kinds[0])
        return torch.stack(targets), torch.stack(pair_targets)

    def _affinity(self, asked: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        logits = torch.cat([queries @ keys.transpose(-1, -2) for queries, keys in asked], dim=1)
        return torch.sigmoid(self.attn_proj(logits + logits.transpose(-1, -2)))[:, 0]


def method(kind: type[afa.Method]) -> afa.Method:
    """MiT-B1 as published, with random weights."""
    params = afa.Params(
        architecture="mit_b1", image_size=SIZE, drop_path=0.0, pool="features", topk_share=1.0, cam_iters=0.1, aff_iters=0.3,
        cam_scales=(1.0, 0.5, 1.5), pseudo_label_mode="eval", affinity_from="cam", labels=afa.PUBLISHED_LABELS, affinity_start="random",
        decoder_width=256, decoder_dropout=0.0, segmentation_weight=0.1, affinity_weight=0.1, energy=None, freeze_norms=True,
        backbone_lr_factor=0.1, affinity_lr_factor=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    schedule = Schedule(1, BATCH, 1, 1e-3, 0.0, "adamw", "linear", 0, 0.0)
    return kind(LabelSpace(tuple(map(str, range(CLASSES)))), params, schedule, plugins.load("nn", "mit")).train()


def step_of(kind: type[afa.Method], clock: Clock) -> Callable[[], dict[str, Tensor]]:
    trained = method(kind)
    images = torch.stack(
        [torch.from_numpy(photograph(index, (SIZE, SIZE)).copy()).permute(2, 0, 1) for index in range(BATCH)]
    )
    tags = torch.zeros(BATCH, CLASSES)
    tags[:, [3, 7]] = 1
    batch = Batch(images.float() / 255, tags, torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool), None)

    def step() -> dict[str, Tensor]:
        for parameter in trained.parameters():
            parameter.grad = None
        losses = trained.losses(batch, clock)
        torch.stack(list(losses.values())).sum().backward()
        return losses

    return step


VARIANTS = {
    f"{stage}-{name}": partial(step_of, kind, clock)
    for stage, clock in CLOCKS.items()
    for name, kind in (("ours", afa.Method), ("always", Always))
}


def training(folder: Path) -> list[Timing | Memory]:
    """Losses of both forms must agree before they are timed. One row for each part of training."""
    del folder
    torch.set_num_threads(1)
    for clock in CLOCKS.values():
        mine, plain = step_of(afa.Method, clock)(), step_of(Always, clock)()
        for name, loss in mine.items():
            torch.testing.assert_close(loss, plain[name], atol=1e-4, rtol=1e-3)
    what = f"AFA training step, {BATCH} × {SIZE} px, MiT-B1"
    found: list[Timing | Memory] = []
    for stage in CLOCKS:
        found += pair(NAME, f"{stage}-ours", f"{stage}-always", f"{what}, {stage}", BATCH, "images", "all passes and labels")
    return found


if __name__ == "__main__":
    main_of(VARIANTS)()
