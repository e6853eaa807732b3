"""The ViT segmenter against the authors' figures, and its losses on awkward batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.nn.vit import backbone, coco_ids
from pipeline.segmenters.vit.segmenter import Clipping, Options, Params, Segmenter, clipped_cross_entropy
from pipeline.training import checkpoint
from pipeline.training.pixel_losses import balanced_cross_entropy
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights

LAST = Options(None)
SCHEDULE = Schedule(
    epochs=1, min_steps=0, batch_size=2, shards=1, lr=1e-3, weight_decay=0.01, optimiser="adamw", schedule="poly",
    warmup=0, lr_floor=0.0
)  # fmt: skip
MODEL: dict[str, Any] = {
    "architecture": "scenes_vit", "image_size": 32, "drop_path": 0.0, "decoder_blocks": 1, "decoder_heads": 4,
    "decoder_dropout": 0.0, "encoder_lr_factor": 0.1, "balance": "pixels", "clipping": None,
}  # fmt: skip


def small(**changes: Any) -> Segmenter:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    params = parse(Params, MODEL | changes, "retrain.cam.model")
    return Segmenter(LabelSpace(("disc", "square")), params, SCHEDULE, backbone)


def batch(masks: Tensor, images: Tensor | None = None) -> Batch:
    b, h, w = masks.shape
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(b, 3, h, w, generator=generator) if images is None else images
    return Batch(images, torch.ones(b, 2), masks != IGNORE, masks)


def loss_of(model: Segmenter, labelled: Batch) -> Tensor:
    return model.losses(labelled, Clock(0, 0, 1))["segmentation"]


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, Any], dict[str, Tensor]]:
    case = golden("weaktr_segmenter")
    return case, golden_weights(case["keys"].tolist(), case["shapes"].tolist(), int(case["seed"]))


@pytest.mark.parametrize("name", ["aligned", "padded"])
def test_official_weights_give_the_authors_masks(name: str, official: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    case, weights = official
    torch.set_num_threads(1)
    model = Segmenter.from_official(weights)
    normalise = model.backbone.normalise
    images = torch.from_numpy(case[f"{name}_input"]) * normalise.std + normalise.mean
    with torch.no_grad():
        logits = model.segment(images, LAST)
    wanted = torch.from_numpy(case[f"{name}_mask_logits_ds2"])
    assert (logits[..., ::2, ::2] - wanted).abs().max() < 2e-4
    assert (logits.argmax(dim=1) == torch.from_numpy(case[f"{name}_argmax"])).float().mean() >= 0.998


@pytest.mark.parametrize("name", ["aligned", "padded"])
def test_two_heads_are_the_authors_masks_after_each_block(
    name: str, official: tuple[dict[str, Any], dict[str, Tensor]]
) -> None:
    case, weights = official
    model = Segmenter.from_official({"model": weights, "n_cls": 21})
    normalise = model.backbone.normalise
    images = torch.from_numpy(case[f"{name}_input"]) * normalise.std + normalise.mean
    with torch.no_grad():
        blocks = [model.segment(images, Options(weights)) for weights in ((1.0, 0.0), (0.0, 1.0))]
        mixed = model.segment(images, Options((0.8, 1.0))).exp()
    for block, log_probabilities in enumerate(blocks, start=1):
        wanted = torch.from_numpy(case[f"{name}_two_head_block{block}_ds4"]).log_softmax(dim=1)
        assert (log_probabilities[..., ::4, ::4] - wanted).abs().max() < 4e-4
    torch.testing.assert_close(mixed, (0.8 * blocks[0].exp() + blocks[1].exp()) / 1.8)


def test_block_weights_must_fit_the_decoder() -> None:
    with pytest.raises(ValueError, match=r"2 weights for 1 decoder blocks; edit the recipe"):
        small().segment(torch.rand(1, 3, 32, 32), Options((0.8, 1.0)))
    with pytest.raises(ParamsError, match="block_weights"):
        parse(Options, {"block_weights": [0.0, 0.0]}, "segment.weaktr.options")


def test_an_official_segmenter_serves_through_the_stage(
    official: tuple[dict[str, Any], dict[str, Tensor]], tmp_path: Path
) -> None:
    first = Segmenter.from_official(official[1])
    torch.save({"model": official[1], "n_cls": 21, "epoch": 1}, tmp_path / "checkpoint.pth")
    again = Segmenter(LabelSpace(tuple(f"class {n}" for n in range(20))), first.params, SCHEDULE, backbone)
    again.load_initial(backbone, tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in first.state_dict().items())
    checkpoint.save_tensors(tmp_path / "ours.safetensors", again.state_dict(), {})
    again.load_initial(backbone, tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint\.pth does not fit"):
        small().load_initial(backbone, tmp_path / "checkpoint.pth")


def test_cocos_91_planes_become_background_and_80_classes(official: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    numbers = torch.arange(91.0)
    weights = official[1] | {
        "decoder.cls_emb": numbers.view(1, 91, 1).expand(1, 91, 384),
        "decoder.mask_norm.weight": numbers,
        "decoder.mask_norm.bias": numbers,
    }
    model = Segmenter.from_official(weights)
    assert model.decoder.mask_norm.bias.tolist() == [0, *coco_ids.COCO_USED_IDS]
    assert model.decoder.cls_emb[0, :, 7].tolist() == [0, *coco_ids.COCO_USED_IDS]


def test_a_wrong_official_file_is_refused_with_the_keys_that_miss(
    official: tuple[dict[str, Any], dict[str, Tensor]],
) -> None:
    weights = dict(official[1])
    del weights["decoder.proj_patch"], weights["encoder.blocks.3.attn.qkv.bias"]
    weights["head.weight"], weights["encoder.norm.bias"] = torch.zeros(1), torch.zeros(7)
    with pytest.raises(ValueError) as caught:
        Segmenter.from_official(weights)
    for words in (
        "decoder.proj_patch is missing",
        "encoder.blocks.3.attn.qkv.bias is missing",
        "head.weight is unknown",
        "(7,)",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match=r"encoder.pos_embed, .*decoder.cls_emb missing"):
        Segmenter.from_official({"fc.weight": torch.zeros(1)})


@pytest.mark.parametrize("name", ["below_p24", "above_p24", "below_p12"])
def test_clipping_is_the_authors(name: str) -> None:
    case = golden("weaktr_clip_loss")
    logits = torch.from_numpy(case["logits"]).requires_grad_()
    labels = torch.from_numpy(case["labels"])
    start, cell = float(case[f"{name}_start_value"]), int(case[f"{name}_patch_size"])
    loss = clipped_cross_entropy(logits, labels, start=start, cell=cell)
    loss.backward()
    assert logits.grad is not None
    assert abs(loss.item() - case[f"{name}_loss"]) < 1e-6
    learns = torch.from_numpy(case[f"{name}_grad_pixels"])
    assert ((logits.grad != 0).any(dim=1) == learns).float().mean() >= 0.9999
    if f"{name}_grad_logits" in case:
        assert (logits.grad - torch.from_numpy(case[f"{name}_grad_logits"])).abs().max() < 1e-8


def test_balanced_loss_is_the_authors() -> None:
    case = golden("afa_affinity")
    grid = torch.from_numpy(case["seg_logits_grid"]).requires_grad_()
    labels = torch.from_numpy(case["label_pseudo_par"])
    logits = torch.nn.functional.interpolate(grid, labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = balanced_cross_entropy(logits, labels)
    loss.backward()
    assert grid.grad is not None
    assert abs(loss.item() - float(case["seg_loss"])) < 1e-5
    assert (grid.grad - torch.from_numpy(case["seg_loss_grad"])).abs().max() < 1e-6


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), cell=st.integers(1, 50), start=st.floats(0.1, 3))
def test_clipping_never_raises_the_loss_and_takes_any_size(h: int, w: int, cell: int, start: float) -> None:
    logits = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(h * 41 + w))
    labels = torch.randint(0, 3, (2, h, w), generator=torch.Generator().manual_seed(7))
    plain = torch.nn.functional.cross_entropy(logits, labels)
    clipped = clipped_cross_entropy(logits, labels, start=start, cell=cell)
    assert clipped <= plain + 1e-6
    assert plain <= start or abs(clipped - plain) < 1e-6


LOSSES = [
    {},
    {"balance": "background_foreground"},
    {"clipping": {"start": 10.0, "cell": 8}},
    {"clipping": {"start": 0.1, "cell": 7}},
]


@pytest.mark.parametrize("changes", LOSSES)
@pytest.mark.parametrize("value", [0, 1, IGNORE])
def test_a_batch_with_one_kind_of_pixel_has_finite_loss_and_gradients(changes: dict[str, Any], value: int) -> None:
    model = small(**changes)
    loss = loss_of(model, batch(torch.full((2, 32, 32), value, dtype=torch.uint8)))
    loss.backward()
    assert torch.isfinite(loss) and (value != IGNORE or loss == 0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("balance", ["pixels", "background_foreground"])
def test_pixels_of_255_do_not_count(balance: str) -> None:
    model = small(balance=balance)
    masks = torch.randint(0, 3, (1, 32, 32), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    labelled = batch(masks)
    masks[:, 16:] = IGNORE
    with torch.no_grad():
        logits = model.segment(labelled.images, LAST)
        upper = torch.nn.functional.cross_entropy(logits[:, :, :16], masks[:, :16].long())
        if balance == "background_foreground":
            upper = balanced_cross_entropy(logits[:, :, :16], masks[:, :16])
        assert torch.allclose(loss_of(model, labelled), upper, atol=1e-6)


def test_training_on_one_mask_learns_it() -> None:
    model = small(encoder_lr_factor=1.0)
    images = torch.zeros(1, 3, 32, 32)
    images[..., :16] = 1
    masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
    masks[..., :16] = 2
    groups = [
        {"params": list(group.parameters), "lr": 3e-3 * group.lr_factor} for group in model.param_groups(model.phases()[0])
    ]
    optimiser = torch.optim.AdamW(groups)
    for _ in range(25):
        optimiser.zero_grad()
        loss_of(model, batch(masks, images)).backward()
        optimiser.step()
    with torch.no_grad():
        assert (model.eval().segment(images, LAST).argmax(dim=1) == masks).float().mean() > 0.95


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 31), (64, 64)])
def test_any_size_gives_logits_of_that_size(size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = small().eval().segment(torch.rand(2, 3, *size), LAST)
    assert logits.shape == (2, 3, *size)
    assert torch.isfinite(logits).all()


def test_a_frozen_encoder_gets_no_gradients_and_no_learning_rate() -> None:
    model = small(encoder_lr_factor=0.0)
    loss_of(model, batch(torch.zeros(1, 32, 32, dtype=torch.uint8))).backward()
    trained = {id(p) for group in model.param_groups(model.phases()[0]) for p in group.parameters}
    assert trained == {id(p) for p in model.decoder.parameters()}
    assert all(p.grad is None for p in model.backbone.parameters())


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = small()
    grouped = [id(p) for group in model.param_groups(model.phases()[0]) for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ParamsError, match="set balance to pixels, or clipping to null"):
        small(clipping={"start": 1.2, "cell": 8}, balance="background_foreground")
    with pytest.raises(ValueError, match="decoder_heads 3 does not divide the 128 channels of scenes_vit"):
        small(decoder_heads=3)
    assert small(clipping={"start": 1.2, "cell": 8}).params.clipping == Clipping(1.2, 8)
