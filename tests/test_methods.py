"""The matrix: every method on every backbone family and data set fills the contract, on 64 px toys."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core import config, plugins
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract
from pipeline.imaging.pooling import pooled, valid_cells
from pipeline.jobs import score_maps
from pipeline.nn import weights
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.shared_data import shared
from tests.toys import SCRATCH, toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
ARCHITECTURES = {
    "vit": ["scenes_vit", "deit_tiny_patch16_224"],
    "resnet": ["resnet18", "scenes_resnet"],
    "mit": ["mit_b0", "scenes_mit"],
    "efficientnet": ["tf_efficientnet_lite0"],
}
# class tokens need a ViT, affinities attention, and PPL cuts between blocks of one kind
REFUSED = {(name, other) for name in ("weaktr", "semples") for other in ("resnet", "mit", "efficientnet")} | {
    ("afa", "resnet"),
    ("afa", "efficientnet"),
    ("ppl", "mit"),
}
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
BACKBONES = [(name, architecture) for name, names in ARCHITECTURES.items() for architecture in names]
SETTINGS = Extract((1.0, 1.5), None, True, "irn", 4, 8, 0.5, False, "fp32", 64, "gzip", 0, {})


def built(method: str, backbone: str, architecture: str, **changes: Any) -> Any:
    module = plugins.load("methods", method)
    model = toy_recipe(method)["train"]["model"]
    model |= {
        "architecture": architecture,
        "image_size": 64,
        **changes,
    }
    params = config.parse(module.Params, model, "model")
    torch.manual_seed(0)
    return module.Method(LABELS, params, SCHEDULE, plugins.load("nn", backbone))


def options_of(method: str) -> Any:
    return config.parse(plugins.load("methods", method).Options, toy_recipe(method)["extract"]["options"], "o")


def batch(padding: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(0)
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    if padding:
        valid[:, :, -padding:] = False
    return Batch(torch.rand(2, 3, 64, 64, generator=generator), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), valid, None)


@pytest.mark.parametrize("method", plugins.available("methods"))
@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
def test_every_method_fills_the_contract_on_every_backbone(method: str, backbone: str, architecture: str) -> None:
    if (method, backbone) in REFUSED:
        with pytest.raises(
            ValueError, match=r"set methods\.<\w+>\.backbone to (vit|mit or vit|vit or resnet) in params\.yaml"
        ):
            built(method, backbone, architecture)
        return
    network = built(method, backbone, architecture)
    phases = network.phases()
    losses = network.losses(batch(), Clock(0, 0, 10))
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    trained = [p for group in network.param_groups(phases[0]) for p in group.parameters]
    assert torch.isfinite(total) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert len({id(p) for p in trained}) == len(trained)
    network.eval()
    options = options_of(method)
    maps = network.score_maps(torch.rand(2, 3, 64, 96), options)
    assert maps.scores.shape == (2, 3, 64 // network.stride, 96 // network.stride) and maps.tag_logits.shape == (2, 3)
    assert (maps.scores >= 0).all()
    assert all(isinstance(value, torch.Tensor) for value in network.inspect(torch.rand(1, 3, 64, 64)).values())
    assert any(value.ndim == 4 and value.shape[1] == 3 for value in network.inspect(torch.rand(1, 3, 64, 96)).values())


@pytest.mark.parametrize("pool", ["gap", "gmp", "topk"])
def test_padding_takes_no_part_in_pooling(pool: str) -> None:
    pool_maps = partial(pooled, pool=pool, topk_share=0.5)  # type: ignore[arg-type]
    maps = torch.randn(2, 3, 4, 4)
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, :, 2:] = False
    changed = maps.clone()
    changed[..., 2:] += 100
    torch.testing.assert_close(pool_maps(maps, valid), pool_maps(changed, valid))
    assert not torch.allclose(pool_maps(maps, None), pool_maps(changed, None))


def test_a_cell_is_valid_where_any_of_its_pixels_is() -> None:
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[:, :5, :4] = True
    assert valid_cells(valid, (2, 2)).tolist() == [[[True, False], [True, False]]]


def test_a_frozen_backbone_gets_no_gradient() -> None:
    network = built("cam", "vit", "scenes_vit", backbone_lr_factor=0)
    sum(network.losses(batch(16), Clock(0, 0, 1)).values()).backward()
    assert all(p.grad is None for p in network.backbone.parameters()) and network.head.weight.grad is not None


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (61, 83)])
def test_images_of_any_size_get_maps_at_stride_4(size: tuple[int, int]) -> None:
    network = built("cam", "vit", "scenes_vit").eval()
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    record = ImageRecord("x", "x.png", size, "train", (0, 2), b"")
    fields = score_maps.score([image], [record], network, plugins.load("methods", "cam").Options(), SETTINGS, "cpu")[0]
    assert fields["scores"].shape == (2, -(-size[0] // 4), -(-size[1] // 4)) and fields["scores"].dtype == np.float16
    assert fields["classes"].tolist() == [0, 2] and fields["scores"].max() <= 1


def test_maps_of_a_batch_are_those_of_single_images() -> None:
    network = built("cam", "vit", "scenes_vit").eval()
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(3)]
    records = [ImageRecord(str(at), "", (48, 64), "train", (at,), b"") for at in range(3)]
    options = plugins.load("methods", "cam").Options()
    together = score_maps.score(images, records, network, options, SETTINGS, "cpu")
    for at in range(3):
        alone = score_maps.score(images[at : at + 1], records[at : at + 1], network, options, SETTINGS, "cpu")[0]
        np.testing.assert_allclose(together[at]["scores"], alone["scores"], atol=2e-3)


def test_val_and_untagged_images_get_the_classes_that_the_network_predicts() -> None:
    network = built("cam", "vit", "scenes_vit").eval()
    image = np.zeros((64, 64, 3), np.uint8)
    records = [ImageRecord("v", "", (64, 64), "val", (0,), b""), ImageRecord("u", "", (64, 64), "train", None, b"")]
    for fields in score_maps.score(
        [image, image], records, network, plugins.load("methods", "cam").Options(), SETTINGS, "cpu"
    ):
        expected = np.flatnonzero(1 / (1 + np.exp(-fields["tag_logits"])) >= 0.5)
        np.testing.assert_array_equal(fields["classes"], expected)


def test_an_image_that_is_tagged_with_nothing_has_no_map() -> None:
    network = built("cam", "vit", "scenes_vit").eval()
    record = ImageRecord("n", "", (64, 64), "train", (), b"")
    options = plugins.load("methods", "cam").Options()
    fields = score_maps.score([np.zeros((64, 64, 3), np.uint8)], [record], network, options, SETTINGS, "cpu")[0]
    assert fields["scores"].shape == (0, 16, 16)


def test_deit_weights_load_strictly_and_at_another_size() -> None:
    backbone = plugins.load("nn", "vit").create("deit_tiny_patch16_224", 256, drop_path=0.0)
    plugins.load("nn", "vit").load_initial(backbone, shared("weights", "deit_tiny_patch16_224.fp16.safetensors"))
    assert backbone(torch.rand(1, 3, 64, 96)).shape == (1, 192, 4, 6)


def test_weights_that_are_missing_or_do_not_fit_say_what_to_do(tmp_path: Path) -> None:
    vit = plugins.load("nn", "vit")
    backbone = vit.create("scenes_vit", 64, drop_path=0.0)
    with pytest.raises(FileNotFoundError, match=r"tag2mask weights list"):
        vit.load_initial(backbone, tmp_path / "none.safetensors")
    save_tensors(tmp_path / "other.safetensors", {"conv.weight": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match=r"keys are missing.*check architecture in the recipe and init"):
        vit.load_initial(backbone, tmp_path / "other.safetensors")
    vit.load_initial(backbone, SCRATCH)


def test_a_pth_file_in_a_wrapper_loads_and_a_pickled_program_does_not(tmp_path: Path) -> None:
    vit = plugins.load("nn", "vit")
    backbone = vit.create("scenes_vit", 64, drop_path=0.0)
    torch.save({"model": {f"module.{k}": v for k, v in backbone.net.state_dict().items()}}, tmp_path / "a.pth")
    vit.load_initial(backbone, tmp_path / "a.pth")
    torch.save({"model": Path}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth cannot be read as weights: UnpicklingError"):
        weights.read_weights(tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["vit_huge_of_nobody", "resnet18"])
def test_an_architecture_that_is_no_vit_is_refused_with_advice(name: str) -> None:
    with pytest.raises(ValueError, match=r"architecture in the recipe|backbone to resnet"):
        plugins.load("nn", "vit").create(name, 64, drop_path=0.0)


def test_an_unknown_plug_in_is_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"there are .*cam"):
        plugins.load("methods", "camm")


def test_keeping_an_affinity_that_the_method_does_not_have_is_an_error() -> None:
    network = built("cam", "vit", "scenes_vit").eval()
    settings = Extract((1.0,), None, False, "irn", 4, 8, 0.5, True, "fp32", 64, "gzip", 0, {})
    record = ImageRecord("x", "", (64, 64), "train", (0,), b"")
    with pytest.raises(ValueError, match="keep_affinity"):
        score_maps.score(
            [np.zeros((64, 64, 3), np.uint8)], [record], network, plugins.load("methods", "cam").Options(), settings, "cpu"
        )


def test_the_shipped_backbone_fits_and_is_small() -> None:
    path = SCRATCH.with_name("scenes_vit.fp16.safetensors")
    assert path.stat().st_size < 4 * 2**20
    backbone = plugins.load("nn", "vit").create("scenes_vit", 128, drop_path=0.0)
    plugins.load("nn", "vit").load_initial(backbone, path)


def test_drawn_scenes_are_fair_and_always_the_same(tmp_path: Path) -> None:
    from pipeline.datasets.scenes import dataset as scenes

    drawn = [scenes.draw_scene(scenes.scene_rng(0, "train", index)) for index in range(60)]
    fraction = np.mean([(mask > 0).mean() for _, mask, _, _ in drawn])
    assert 0.25 <= fraction <= 0.35
    places = [place for _, _, tags, place in drawn if tags and tags[0] in ("boat", "fish")]
    assert places.count("sea") > 0.6 * len(places)
    for _, mask, tags, _ in drawn:
        counts = np.bincount(mask.ravel(), minlength=7)
        assert {scenes.CLASSES[value - 1] for value in range(1, 7) if counts[value] >= 40} == set(tags)
    assert scenes.write(tmp_path / "a", seed=3, train=3, val=1) and not scenes.write(tmp_path / "a", seed=3, train=3, val=1)
    scenes.write(tmp_path / "b", seed=3, train=2, val=1)
    for name in ("train_0000.png", "train_0001.png", "val_0000.png"):
        first, second = ((tmp_path / folder / "images" / name).read_bytes() for folder in ("a", "b"))
        assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
        assert np.asarray(Image.open(tmp_path / "a" / "masks" / name)).max() <= 6
