"""WeakTr against a plain classifier, and its fusion against the direct form. Each variant runs in a process of its own.

`python -m benchmarks.weaktr VARIANT` prints seconds and MiB as JSON; benchmarks/run.py sets pairs of variants side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Memory, Timing, main_of, pair, photograph
from pipeline.core import plugins
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract
from pipeline.jobs import score_maps as scoring
from pipeline.methods.cam import method as cam
from pipeline.methods.weaktr import method as weaktr
from pipeline.nn.vit import fusion
from pipeline.training.settings import Schedule

NAME = "benchmarks.weaktr"
CLASSES, BATCH, SIZE = 20, 32, 224
PHOTOGRAPH = (375, 500)
HEADS, LAYERS, WIDTH = 3, 12, 64  # DeiT-Tiny


def method(name: str) -> Any:
    """cam or weaktr on DeiT-Tiny with random weights, as their papers build them."""
    labels = LabelSpace(tuple(f"class {number}" for number in range(CLASSES)))
    schedule = Schedule(1, 0, BATCH, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    torch.manual_seed(0)
    family = plugins.load("nn", "vit")
    if name == "cam":
        return cam.Method(labels, cam.Params("deit_tiny_patch16_224", SIZE, "gap", 1.0, 1.0, 0.0), schedule, family)
    params = weaktr.Params(
        architecture="deit_tiny_patch16_224", image_size=SIZE, drop_path=0.0, features="residual", token_weight="each",
        attention="fused", patch_refine=True, pool="gap", topk_share=1.0, attention_pool="max", reduction=8,
        feature_reduction=8,
        class_head="mean", patch_head="conv3", backbone_lr_factor=1.0,
    )  # fmt: skip
    return weaktr.Method(labels, params, schedule, family)


def step_of(name: str) -> Callable[[], object]:
    """Forward and backward of one batch."""
    trained = method(name).train()
    tags = torch.randint(0, 2, (BATCH, CLASSES)).float()
    batch = Batch(torch.rand(BATCH, 3, SIZE, SIZE), tags, torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool), None)

    def step() -> None:
        for parameter in trained.parameters():
            parameter.grad = None
        torch.stack(list(trained.losses(batch, Clock(0, 0, 1)).values())).sum().backward()

    return step


def maps_of(name: str) -> Callable[[], object]:
    """Score maps of two photographs at scales 1.0 and 1.2 with mirror images."""
    trained = method(name).eval()
    options = plugins.load("methods", name).Options()
    merge = "irn" if name == "cam" else "weaktr"
    settings = Extract((1.0, 1.2), None, True, merge, 4, 16, 0.5, False, "fp32", 64, "gzip", 0, {})
    images = [photograph(index, PHOTOGRAPH) for index in range(2)]
    records = [ImageRecord(str(index), "", PHOTOGRAPH, "train", (index, index + 5), b"") for index in range(2)]
    return lambda: scoring.score(images, records, trained, options, settings, "cpu")


def fusion_of(name: str) -> Callable[[], object]:
    """From each layer's attention to the gradient of the fine CAM's logits in the fusion's parameters."""
    torch.manual_seed(0)
    patches = (SIZE // 16) ** 2
    tokens = CLASSES + patches
    net = fusion.AttentionFusion(HEADS * WIDTH, HEADS, LAYERS, reduction=8, feature_reduction=8, pool="max")
    queries_and_keys = [tuple(torch.randn(2, BATCH, HEADS, tokens, WIDTH)) for _ in range(LAYERS)]
    branches = [torch.randn(BATCH, tokens, HEADS * WIDTH) for _ in range(LAYERS)]
    coarse = torch.rand(BATCH, CLASSES, patches)

    def by_rows() -> Tensor:
        rows = fusion.AttentionRows(net, CLASSES, torch.full((BATCH, patches), 1 / patches))
        for layer, (queries, keys) in enumerate(queries_and_keys):
            rows.pooled_features.append(net.pooled(branches[layer]))
            rows.record(layer, queries * WIDTH**-0.5, keys, None)
        cross, mean_row = rows.fused()
        return (cross * coarse * mean_row).sum(dim=2)

    # the backbone of the direct form makes the maps in its own forward
    maps = [] if name == "rows" else [(q * WIDTH**-0.5 @ k.transpose(-1, -2)).softmax(-1) for q, k in queries_and_keys]

    def direct() -> Tensor:
        stacked = torch.stack(maps).clone().permute(1, 2, 0, 3, 4).contiguous().flatten(1, 2)  # [b,k,n,n]
        features = torch.stack(branches).view(LAYERS, BATCH, tokens, WIDTH, HEADS).permute(1, 4, 0, 2, 3).contiguous()
        pooled = features.flatten(1, 2).amax(dim=2)
        weights = net.attn_head_ffn(net.attn_feat_ffn(pooled)[..., 0])[..., None, None]
        cross = (weights * stacked).mean(dim=1)[:, :CLASSES, CLASSES:]
        refine = (weights * stacked).mean(dim=1)[:, CLASSES:, CLASSES:]
        return torch.einsum("bpj,bcj->bcp", refine, cross * coarse).mean(dim=2)

    form = by_rows if name == "rows" else direct

    def step() -> list[Tensor]:
        for parameter in net.parameters():
            parameter.grad = None
        logits = form()
        logits.square().sum().backward()
        return [logits.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]

    return step


VARIANTS: dict[str, Callable[[], Callable[[], object]]] = {
    "train-cam": lambda: step_of("cam"),
    "train-weaktr": lambda: step_of("weaktr"),
    "maps-cam": lambda: maps_of("cam"),
    "maps-weaktr": lambda: maps_of("weaktr"),
    "fusion-rows": lambda: fusion_of("rows"),
    "fusion-direct": lambda: fusion_of("direct"),
}


def training(folder: Path) -> list[Timing | Memory]:
    del folder
    return pair(NAME, "train-weaktr", "train-cam", "WeakTr training step, 32 × 224 px", BATCH, "images", "plain classifier")


def score_maps(folder: Path) -> list[Timing | Memory]:
    del folder
    return pair(NAME, "maps-weaktr", "maps-cam", "WeakTr score maps, 375×500, 4 views", 2, "images", "plain CAM")


def fused(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    torch.set_num_threads(1)
    for mine, plain in zip(fusion_of("rows")(), fusion_of("direct")(), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(mine, plain, atol=1e-4, rtol=1e-3)
    return pair(NAME, "fusion-rows", "fusion-direct", "fusion alone, training", BATCH, "images", "stack, clone, weigh twice")


if __name__ == "__main__":
    main_of(VARIANTS)()
