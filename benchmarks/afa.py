"""An AFA training step against the same step with all passes and labels always. Each variant runs in its own process.

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
from pipeline.methods.afa.labels import classes_and_windows
from pipeline.training.settings import Schedule

NAME = "benchmarks.afa"
CLASSES, BATCH, SIZE = 20, 2, 320
CLOCKS = {"warm-up": Clock(0, 0, 100), "labelled": Clock(0, 15, 100), "spread": Clock(0, 60, 100)}


class Always(afa.Method):
    """The reference: at each step all views with decoder and single heads' logits, and plain and spread labels, of each
    threshold by itself."""

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        labels = self.training_labels(batch, spread=clock.reached(self.params.aff_iters))
        last = Clock(clock.phase, clock.steps, clock.steps)
        self.computed_labels = labels
        losses = super().losses(batch, last)
        return losses if clock.reached(self.params.cam_iters) else {"classification": losses["classification"]}

    def training_labels(self, batch: Batch, *, spread: bool) -> tuple[Tensor, Tensor]:
        if hasattr(self, "computed_labels"):
            labels = self.computed_labels
            del self.computed_labels
            return labels
        with torch.no_grad():
            return self._all_labels(batch, spread)

    def _all_labels(self, batch: Batch, spread: bool) -> tuple[Tensor, Tensor]:
        views, affinity, settings = [], None, self.params.labels
        size = (batch.images.shape[-2], batch.images.shape[-1])
        with self._labelling():
            for scale in sorted(self.params.cam_scales, reverse=True):
                view_size = transforms.view_size(size, scale, self.stride)
                view = F.interpolate(batch.images, view_size, mode="bilinear", align_corners=False)
                features, queries_keys = self.backbone.stages(torch.cat([view, view.flip(-1)]))
                self.decoder(features)
                view_affinity = self.affinity(queries_keys)[: len(view)]
                affinity = view_affinity if affinity is None else affinity
                views.append(torch.stack(self.classifier(features[-1]).chunk(2), dim=1))
        assert affinity is not None
        targets, pair_targets = [], []
        for row, tags in enumerate(batch.tags):
            classes = torch.nonzero(tags).flatten()
            scores = merge_views([view[row][:, classes] for view in views], rule="afa", size=size)
            spread_planes = pseudo_labels.spread_planes(scores, affinity[row], views[0].shape[-2:], settings)
            _, window = classes_and_windows(batch)[row]
            plain = pseudo_labels.plain_planes(scores, settings)
            labels = []
            for planes in (plain, spread_planes):  # each threshold by itself, in the place of low and high
                low, high = (
                    pseudo_labels.refined_labels(batch.images[row], [pair], classes, window, settings)[0]
                    for pair in (planes[index : index + 1].expand(2, -1, -1, -1) for index in (0, 1))
                )
                labels.append(pseudo_labels.trinary_labels(low, high))
            targets.append(labels[spread])
            pair_targets.append(labels[0])
        return torch.stack(targets), torch.stack(pair_targets)

    def affinity(self, queries_keys: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        logits = torch.cat([queries @ keys.transpose(-1, -2) for queries, keys in queries_keys], dim=1)
        return torch.sigmoid(self.attn_proj(logits + logits.transpose(-1, -2)))[:, 0]


def method(kind: type[afa.Method]) -> afa.Method:
    """MiT-B1 as published, with random weights."""
    params = afa.Params(
        architecture="mit_b1", image_size=SIZE, drop_path=0.0, pool="features", topk_share=1.0, cam_iters=0.1, aff_iters=0.3,
        cam_scales=(1.0, 0.5, 1.5), pseudo_label_mode="eval", affinity_from="cam", labels=afa.PUBLISHED_LABELS,
        affinity_start="random", decoder_width=256, decoder_dropout=0.0, segmentation_weight=0.1, affinity_weight=0.1,
        energy=None, freeze_norms=True, backbone_lr_factor=0.1, affinity_lr_factor=1.0,
    )  # fmt: skip
    torch.manual_seed(0)
    schedule = Schedule(1, 0, BATCH, 1, 1e-3, 0.0, "adamw", "linear", 0, 0.0)
    return kind(LabelSpace(tuple(map(str, range(CLASSES)))), params, schedule, plugins.load("nn", "mit")).train()


def step_of(kind: type[afa.Method], clock: Clock) -> Callable[[], dict[str, Tensor]]:
    trained_method = method(kind)
    images = torch.stack(
        [torch.from_numpy(photograph(index, (SIZE, SIZE)).copy()).permute(2, 0, 1) for index in range(BATCH)]
    )
    tags = torch.zeros(BATCH, CLASSES)
    tags[:, [3, 7]] = 1
    batch = Batch(images.float() / 255, tags, torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool), None)

    def step() -> dict[str, Tensor]:
        for parameter in trained_method.parameters():
            parameter.grad = None
        losses = trained_method.losses(batch, clock)
        torch.stack(list(losses.values())).sum().backward()
        return losses

    return step


VARIANTS = {
    f"{stage}-{name}": partial(step_of, kind, clock)
    for stage, clock in CLOCKS.items()
    for name, kind in (("ours", afa.Method), ("always", Always))
}


def training(folder: Path) -> list[Timing | Memory]:
    """Losses of both forms must agree before they are timed. A row for each part of training."""
    del folder
    torch.set_num_threads(1)
    for clock in CLOCKS.values():
        losses, reference = step_of(afa.Method, clock)(), step_of(Always, clock)()
        for name, loss in losses.items():
            torch.testing.assert_close(loss, reference[name], atol=1e-4, rtol=1e-3)
    title = f"AFA training step, {BATCH} × {SIZE} px, MiT-B1"
    rows: list[Timing | Memory] = []
    for stage in CLOCKS:
        rows += pair(NAME, f"{stage}-ours", f"{stage}-always", f"{title}, {stage}", BATCH, "images", "all passes and labels")
    return rows


if __name__ == "__main__":
    main_of(VARIANTS)()
