"""Segmenters of segmentation_models_pytorch: any size, norms that see one image, the same bytes for any ranks, files."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.jobs import check, train
from pipeline.nn.smp import backbone
from pipeline.segmenters.smp import segmenter as smp
from pipeline.training import loop
from pipeline.training.checkpoint import save_tensors
from pipeline.training.data import TrainingImages
from pipeline.training.settings import Augment, Schedule, Training
from tests.toy_masks import Masks
from tests.toys import PROJECT, SCRATCH, Toy, smp_model, toy_folder
from tests.training_case import AUGMENT, records_of, trained

LABELS = LabelSpace(("disc", "square"))
SCHEDULE = Schedule(1, 0, 4, 2, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
NETWORKS = [
    ("unet", "resnet18", {"decoder_channels": [32, 16, 16, 16, 16]}),
    ("fpn", "tu-tf_efficientnet_lite0", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 64}),
    ("deeplabv3plus", "resnet18", {"decoder_channels": 32, "decoder_atrous_rates": [1, 2, 3]}),
]
each_network = pytest.mark.parametrize(("decoder", "encoder", "options"), NETWORKS)


def segmenter(*network: Any, **changes: Any) -> smp.Segmenter:
    torch.manual_seed(0)
    return smp.Segmenter(LABELS, parse(smp.Params, smp_model(*network) | changes, "model"), SCHEDULE, backbone)


@each_network
def test_an_image_of_any_size_is_labelled_whatever_lies_beside_it(
    decoder: str, encoder: str, options: dict[str, Any]
) -> None:
    model = segmenter(decoder, encoder, options).eval()
    assert model.segment(torch.rand(1, 3, 1, 1), smp.Options()).shape == (1, 3, 1, 1)
    images = torch.rand(2, 3, 33, 70)
    with torch.no_grad():
        together = model.segment(images, smp.Options())
        alone = torch.cat([model.segment(image[None], smp.Options()) for image in images])
    assert together.shape == (2, 3, 33, 70)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_no_norm_keeps_what_a_training_batch_was_like(norm: str) -> None:
    model = segmenter(norm=norm).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    loss = model.losses(Batch(images, torch.zeros(2, 2), valid, masks), Clock(0, 0, 1))["segmentation"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.backbone.modules()) is (norm == "frozen")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.decoder.modules())


@each_network
def test_one_and_two_ranks_train_the_same_bytes_and_the_loss_falls(
    tmp_path: Path, decoder: str, encoder: str, options: dict[str, Any]
) -> None:
    root = toy_folder(tmp_path / "raw", train=4, val=0)
    model = smp_model(decoder, encoder, options)
    augment = Augment(**{**vars(AUGMENT), "size": 32})
    training = Training(0, "fp32", augment, Schedule(3, 0, 4, 2, 3e-3, 0.0, "adamw", "poly", 0, 0.0), model)
    params = parse(smp.Params, model, "model")
    build = partial(train.build, "segmenters", "smp", "smp", LABELS, training, params, SCRATCH)
    images: Any = TrainingImages(records_of(root), root, 2, augment, 0, Masks())  # pyright: ignore[reportArgumentType]
    results = []
    for ranks in (1, 2):
        work = tmp_path / str(ranks)
        results.append(trained(loop.Job(build, images, 0, "fp32", work, "cpu", ranks, 0)))
    assert results[0] == results[1]
    rows = [line.split(",") for line in (tmp_path / "1" / "log.csv").read_text(encoding="utf-8").splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert len(losses) >= 1 and np.isfinite(losses).all() and losses[-1] <= losses[0]


@pytest.mark.parametrize("norm", ["frozen", "group"])
def test_an_encoder_is_loaded_from_the_packages_file_from_a_whole_model_and_from_timms(norm: str, tmp_path: Path) -> None:
    other = backbone.network("fpn", "tu-test_resnet", 5, 3, {})
    own = other.encoder.state_dict()
    counters = [name for name in own if name.endswith("num_batches_tracked")]
    files = {
        "package": {**own, "fc.weight": torch.zeros(1)},
        "whole": {f"encoder.{name}": value for name, value in own.items()} | {"decoder.x": torch.zeros(1)},
        "timm": {name.removeprefix("model."): value for name, value in own.items() if name not in counters},
    }
    for name, tensors in files.items():
        model = segmenter(norm=norm)
        save_tensors(tmp_path / f"{name}.safetensors", tensors, {})
        model.load_initial(backbone, tmp_path / f"{name}.safetensors")
        loaded = model.backbone.encoder.state_dict()
        assert loaded and all(torch.equal(value, own[key]) for key, value in loaded.items())
    save_tensors(tmp_path / "segmenter.safetensors", model.state_dict(), {})
    again = segmenter(norm=norm)
    again.load_initial(backbone, tmp_path / "segmenter.safetensors")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    files["timm"].pop("layer1.0.conv1.weight")
    save_tensors(tmp_path / "cut.safetensors", files["timm"], {})
    with pytest.raises(ValueError, match=r"1 keys are missing \['model.layer1.0.conv1.weight'\]"):
        segmenter(norm=norm).load_initial(backbone, tmp_path / "cut.safetensors")


def test_an_encoder_of_timm_is_given_images_as_it_was_pre_trained_on() -> None:
    mean = segmenter("fpn", "tu-tf_efficientnet_lite0").backbone.normalise.mean
    assert mean.flatten().tolist() == [0.5, 0.5, 0.5]
    mean = segmenter("fpn", "resnet18").backbone.normalise.mean
    assert mean.flatten()[0] == pytest.approx(0.485)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "resnet19"}, "has no 'resnet19'"),
        ({"encoder": "tu-deit_tiny_patch16_224"}, "cannot be built"),
        ({"decoder_options": {"width": 3}}, "unknown width; allowed for fpn are decoder_dropout"),
        ({"decoder": "unet", "depth": 4, "decoder_options": {}}, "5 blocks"),
        ({"decoder": "segnet"}, "deeplabv3plus"),
    ],
)
def test_settings_that_make_no_network_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        segmenter(**changes)


def test_check_says_how_to_install_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(toy_folder(tmp_path / "raw", train=2, val=1))
    toy.params["methods"]["cam"]["segmenter"] = "smp"
    toy.recipes["cam"]["retrain"]["model"] = smp_model()
    toy.recipes["cam"]["segment"]["options"] = {}
    toy.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert not [problem for problem in check.problems() if "smp" in problem]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == backbone.PACKAGE else find(name))
    problems = [problem for problem in check.problems() if "smp" in problem]
    assert len(problems) == 1 and "pip install 'tag2mask[smp]'" in problems[0]


def test_the_recipe_of_the_docs_is_valid() -> None:
    text = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    snippet = yaml.safe_load(text.split("```yaml\nretrain:", 1)[1].split("```", 1)[0])
    assert parse(smp.Params, snippet["model"], "retrain.model").decoder == "fpn"
