"""AFA gives the authors' numbers, computes only what its losses use, and stays finite whatever a batch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core import config, plugins
from pipeline.core.contracts import Clock
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract
from pipeline.imaging import pseudo_labels
from pipeline.jobs import score_maps
from pipeline.methods.afa import method as afa
from pipeline.methods.afa.labels import image_labels
from pipeline.training.checkpoint import save_tensors
from pipeline.training.pixel_losses import dense_energy
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights
from tests.toy_batches import batch
from tests.toys import toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "linear", 0, 0.0)
BACKBONES = [("vit", "scenes_vit"), ("mit", "scenes_mit")]
WARM, LABELLED, SPREAD = Clock(0, 0, 100), Clock(0, 40, 100), Clock(0, 80, 100)  # of cam_iters 0.3 and aff_iters 0.5


def made(backbone: str = "mit", architecture: str = "scenes_mit", **changes: Any) -> afa.Method:
    model = toy_recipe("afa")["train"]["model"]
    model |= {"architecture": architecture, "image_size": 64, "cam_iters": 0.3, "aff_iters": 0.5, **changes}
    torch.manual_seed(0)
    return afa.Method(LABELS, config.parse(afa.Params, model, "model"), SCHEDULE, plugins.load("nn", backbone))


def official() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    file = golden("afa_model")
    return file, golden_weights(file["keys"].tolist(), file["shapes"].tolist(), int(file["seed"]))


def test_published_weights_give_the_authors_maps(tmp_path: Path) -> None:
    file, weights = official()
    method = afa.Method.from_official({f"module.{name}": value for name, value in weights.items()})
    method.backbone.normalise = torch.nn.Identity()  # the golden input is normalised already
    tensors = method.inspect(torch.from_numpy(file["input"]))
    for name in ("cls_logits", "seg_logits", "cam", "affinity"):
        np.testing.assert_allclose(tensors[name].numpy(), file[name], atol=1e-4, rtol=0, err_msg=name)
    for index, block in enumerate((7, 8)):
        np.testing.assert_allclose(
            tensors["attention_logits"][:, index].numpy(), file[f"attn_logits_block{block}"], atol=5e-4, rtol=0
        )
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "wetr_iter_18000.pth")
    again = afa.Method(LabelSpace(tuple(map(str, range(20)))), method.params, SCHEDULE, plugins.load("nn", "mit"))
    again.load_initial(plugins.load("nn", "mit"), tmp_path / "wetr_iter_18000.pth")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), method.state_dict().values(), strict=True))


def test_weights_of_something_else_are_refused_by_name() -> None:
    _, weights = official()
    with pytest.raises(ValueError, match=r"no weights of AFA: attn_proj\.weight missing"):
        afa.Method.from_official({name: value for name, value in weights.items() if name != "attn_proj.weight"})
    with pytest.raises(ValueError, match=r"encoder\.block4\.1\.attn\.q\.bias is missing"):
        afa.Method.from_official({name: value for name, value in weights.items() if name != "encoder.block4.1.attn.q.bias"})
    with pytest.raises(ValueError, match=r"no MiT; there are mit_b0"):
        afa.Method.from_official({name: value for name, value in weights.items() if "block3.1" not in name})


def test_labels_made_in_training_are_the_authors() -> None:
    file = golden("afa_affinity")
    for index, image in enumerate(file["images_u8"]):
        pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        top, bottom, left, right = (int(value) for value in file["img_box_y0y1x0x1"][index])
        window, classes = (slice(top, bottom), slice(left, right)), np.flatnonzero(file["cls_labels"][index])
        cams = torch.from_numpy(file["cams_grid"][index][classes])[None]
        scores = F.interpolate(cams, image.shape[:2], mode="bilinear", align_corners=False)[0]
        plain = pseudo_labels.plain_planes(scores, afa.PUBLISHED_LABELS)
        spread = torch.stack(
            [torch.from_numpy(file[f"propagated_{name}"][index][[0, *(classes + 1)]]) for name in ("low", "high")]
        )
        spread_planes = F.interpolate(spread, image.shape[:2], mode="bilinear", align_corners=False)
        labels = image_labels(pixels, plain, spread_planes, torch.from_numpy(classes), window, afa.PUBLISHED_LABELS)
        for label, name in zip(labels, ("label_pseudo_par", "label_affinity_par"), strict=True):
            assert (label.numpy() == file[name][index]).mean() >= 0.998, name


def test_planes_spread_in_training_are_the_authors() -> None:
    file = golden("afa_affinity")
    for index in range(2):
        classes = np.flatnonzero(file["cls_labels"][index])
        scores = torch.from_numpy(file["cams_grid"][index][classes])
        affinity, grid = torch.from_numpy(file["affinity"][index]), (scores.shape[1], scores.shape[2])
        spread = pseudo_labels.spread_planes(scores, affinity, grid, afa.PUBLISHED_LABELS)
        for planes, name in zip(spread, ("low", "high"), strict=True):
            wanted = file[f"propagated_{name}"][index][[0, *(classes + 1)]]
            np.testing.assert_allclose(planes.numpy(), wanted, atol=1e-5, rtol=0)


@settings(max_examples=15, deadline=None)
@given(heads=st.integers(1, 4), blocks=st.integers(1, 3), n=st.integers(1, 9), width=st.integers(1, 5))
def test_the_affinity_is_that_of_a_convolution_over_all_heads_logits(heads: int, blocks: int, n: int, width: int) -> None:
    method = made()
    generator = torch.Generator().manual_seed(n)
    method.attn_proj = torch.nn.Conv2d(heads * blocks, 1, 1)
    queries_keys = [tuple(torch.randn(2, 2, heads, n, width, generator=generator)) for _ in range(blocks)]
    logits = torch.cat([queries @ keys.transpose(-1, -2) for queries, keys in queries_keys], dim=1)
    direct = torch.sigmoid(method.attn_proj(logits + logits.transpose(-1, -2)))[:, 0]
    torch.testing.assert_close(method.affinity(queries_keys), direct, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
def test_losses_set_in_one_after_the_other(backbone: str, architecture: str) -> None:
    method = made(backbone, architecture)
    assert list(method.losses(batch(), WARM)) == ["classification"]
    for clock in (LABELLED, SPREAD):
        losses = method.losses(batch(), clock)
        assert list(losses) == ["classification", "segmentation", "affinity"]
        torch.stack(list(losses.values())).sum().backward()
        assert method.attn_proj.weight.grad is not None and method.attn_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("iters", "step", "expected"), [(0, 0, True), (0.3, 29, False), (0.3, 30, True), (5, 4, False), (5, 5, True)]
)
def test_a_warm_up_is_given_in_steps_or_as_a_fraction_of_all_steps(iters: float, step: int, expected: bool) -> None:
    assert Clock(0, step, 100).reached(iters) is expected


def test_nothing_is_computed_before_its_loss_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    method, refused = made(), RuntimeError("not needed yet")

    def refuse(*given: Any, **more: Any) -> None:
        raise refused

    monkeypatch.setattr(method.decoder, "forward", refuse)
    monkeypatch.setattr(method, "training_labels", refuse)
    method.losses(batch(), WARM)
    monkeypatch.undo()
    monkeypatch.setattr(afa.pseudo_labels, "spread_planes", refuse)
    method.losses(batch(), LABELLED)
    with pytest.raises(RuntimeError, match="not needed yet"):
        method.losses(batch(), SPREAD)


def test_labels_are_made_without_noise_and_change_no_weights_or_statistics() -> None:
    method = made(drop_path=0.5).train()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    first, second = method.training_labels(batch(), spread=True), method.training_labels(batch(), spread=True)
    assert torch.equal(first[0], second[0]) and method.training
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    noisy = made(drop_path=0.5, pseudo_label_mode="train").train()
    torch.nn.init.normal_(noisy.classifier.weight)
    labels = [noisy.training_labels(batch(), spread=False)[0] for _ in range(2)]
    assert not torch.equal(labels[0], labels[1])


def test_labels_hold_the_tags_alone_and_255_on_padding() -> None:
    for source in ("cam", "spread"):
        method = made(affinity_from=source)
        for spread in (False, True):
            for labels in method.training_labels(batch(padding=20), spread=spread):
                assert set(labels[0].unique().tolist()) <= {0, 1, IGNORE}
                assert set(labels[1].unique().tolist()) <= {0, 2, 3, IGNORE}
                assert (labels[:, :, -20:] == IGNORE).all() and (labels[:, :, :-20] != IGNORE).any()


@pytest.mark.parametrize("tags", [((0, 0, 0), (0, 0, 0)), ((1, 1, 1), (0, 0, 0)), ((1, 0, 0),)])
@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize("size", [16, 64])
def test_losses_are_finite_without_tags_without_pixels_and_below_the_window(tags: Any, padding: int, size: int) -> None:
    method = made(energy={"weight": 0.1, "cells": 16, "sigma_rgb": 0.1, "sigma_xy": 0.2})
    for clock in (WARM, LABELLED, SPREAD):
        losses = method.losses(batch(tags, size, min(padding, size)), clock)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        assert torch.isfinite(total)
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_an_image_without_tags_is_background() -> None:
    targets, _ = made().training_labels(batch(((0, 0, 0),)), spread=True)
    assert (targets == 0).all()


def test_the_decoders_score_maps_at_one_half_are_its_own_masks() -> None:
    method = made().eval()
    maps = method.score_maps(torch.rand(2, 3, 64, 96), afa.Options("decoder"))
    assert maps.decoded is not None and maps.scores.shape == (2, 3, 16, 24)
    assert torch.equal(F.pad(maps.scores, (0, 0, 0, 0, 1, 0), value=0.5).argmax(1), maps.decoded.argmax(1))


def test_score_maps_come_from_cam_or_its_spread_and_affinity_is_kept_on_demand() -> None:
    method, images = made().eval(), torch.rand(2, 3, 64, 96)
    cam, spread = (method.score_maps(images, afa.Options(source)) for source in ("cam", "affinity"))  # type: ignore[arg-type]
    assert cam.affinity is None and spread.affinity is None and not torch.allclose(cam.scores, spread.scores)
    affinity = method.score_maps(images, afa.Options("cam"), keep_affinity=True).affinity
    assert affinity is not None and affinity.shape == (2, 96, 96)
    torch.testing.assert_close(affinity, affinity.transpose(1, 2))


def test_extract_keeps_the_affinity_of_the_stride_and_the_decoders_masks() -> None:
    method = made().eval()
    image = np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8)
    given = Extract((1.5, 1.0), None, True, "mean", 4, 8, 0.5, True, "fp32", 64, "gzip", 0, {})
    train, val = (
        score_maps.score(
            [image], [ImageRecord("x", "x.png", (61, 83), split, (1,), b"")], method, afa.Options("decoder"), given, "cpu"
        )[0]
        for split in ("train", "val")
    )
    assert train["grid"].tolist() == [8, 10] and train["affinity"].shape == (80, 80)
    assert train["decoded"].shape == val["decoded"].shape == (61, 83)
    assert set(np.unique(train["decoded"])) <= {0, 2} and set(np.unique(val["decoded"])) <= {0, 1, 2, 3}


def test_norms_stay_as_they_were_pretrained_unless_asked() -> None:
    for frozen, expected in ((True, False), (False, True)):
        method = made(freeze_norms=frozen)
        trained = {id(p) for group in method.param_groups(method.phases()[0]) for p in group.parameters}
        norms = [p for name, p in method.backbone.named_parameters() if "norm" in name]
        assert norms and all((id(p) in trained) is expected for p in norms)


def test_a_model_of_ours_starts_another_run(tmp_path: Path) -> None:
    first = made()
    save_tensors(tmp_path / "model.safetensors", first.state_dict(), {})
    second = made(drop_path=0.1)
    torch.nn.init.zeros_(second.classifier.weight)
    second.load_initial(plugins.load("nn", "mit"), tmp_path / "model.safetensors")
    assert torch.equal(first.classifier.weight, second.classifier.weight)


def test_energy_is_low_where_labels_follow_colours() -> None:
    images = torch.zeros(1, 3, 32, 32)
    images[..., 16:] = 1
    along, across = torch.zeros(1, 2, 32, 32), torch.zeros(1, 2, 32, 32)
    along[:, 0, :, :16] = along[:, 1, :, 16:] = 1
    across[:, 0, :16] = across[:, 1, 16:] = 1
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    energies = [
        dense_energy(images, probabilities, valid, cells=16, sigma_rgb=0.1, sigma_xy=0.2)
        for probabilities in (along, across)
    ]
    assert 0 <= energies[0] < 0.01 and 0.1 < energies[1] <= 1


def test_a_backbone_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set methods\.<run>\.backbone to mit or vit in params\.yaml"):
        made("resnet", "resnet18")
