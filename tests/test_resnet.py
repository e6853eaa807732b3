"""The ResNet family: published names and shapes, maps of several depths, and passes that can be cut; the latter two for all
families."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.nn.resnet import backbone as resnet
from pipeline.training.checkpoint import save_tensors
from tests.shared_data import shared
from tests.toys import SCRATCH

STRIDES = {
    ("resnet", "resnet18"): (4, 4, 8, 16, 16),
    ("resnet", "resnet50"): (4, 4, 8, 16, 16),
    ("resnet", "resnet18@8"): (4, 4, 8, 8, 8),
    ("resnet", "scenes_resnet"): (4, 4, 8, 8, 8),
    ("vit", "scenes_vit"): (8, 8, 8, 8),
    ("vit", "deit_tiny_patch16_224"): (16, 16, 16, 16),
    ("mit", "mit_b0"): (4, 8, 16, 16),
    ("mit", "scenes_mit"): (4, 8, 8, 8),
}
PPL = "# RECONSTRUCTION, no official checkpoint or code was ever released. PPL"
SPLIT = {"scenes_resnet": 3, "resnet18": 3, "scenes_vit": 3, "deit_tiny_patch16_224": 11}


def made(family: str, architecture: str) -> Any:
    torch.manual_seed(0)
    net = plugins.load("nn", family).create(architecture, 64, drop_path=0.0).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts residual branches at 0: they would not count
            nn.init.uniform_(module.weight, 0.5, 1.0)
    return net


def published(title: str, file: str) -> dict[str, tuple[int, ...]]:
    """Key → shape of one list of ../shared/methods."""
    text = shared("methods", file).read_text(encoding="utf-8")
    part = text[text.index(title) :].split("\n\n")[0]
    rows = re.findall(r"^(\S+)\t\(([\d, ]*)\)", part, re.MULTILINE)
    return {name: tuple(int(side) for side in sides.replace(" ", "").split(",") if side) for name, sides in rows}


def resnet38d() -> resnet.Backbone:
    with torch.device("meta"):
        return resnet.create("resnet38d", 64, drop_path=0.0)


@pytest.mark.parametrize(("family", "architecture"), STRIDES)
@pytest.mark.parametrize("size", [(32, 32), (48, 80)])
def test_feature_maps_have_the_channels_and_strides_that_the_backbone_states(
    family: str, architecture: str, size: tuple[int, int]
) -> None:
    net = made(family, architecture)
    assert net.strides == STRIDES[family, architecture] and net.stride == net.strides[-1] and net.dim == net.dims[-1]
    maps = net.feature_maps(torch.rand(2, 3, *size))
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (2, dim, size[0] // stride, size[1] // stride) for dim, stride in zip(net.dims, net.strides, strict=True)
    ]


@pytest.mark.parametrize(("family", "architecture"), STRIDES)
def test_the_last_of_the_feature_maps_is_the_backbones_map(family: str, architecture: str) -> None:
    net, images = made(family, architecture), torch.rand(1, 3, 64, 48)
    assert torch.equal(net.feature_maps(images)[-1], net(images))


@pytest.mark.parametrize(("family", "architecture"), [key for key in STRIDES if key[1] in SPLIT])
def test_a_pass_that_is_cut_anywhere_ends_where_the_whole_one_does(family: str, architecture: str) -> None:
    net, images = made(family, architecture), torch.rand(2, 3, 64, 96)
    assert net.splits == SPLIT[architecture]
    positions = [net.splits, 1, 2]
    *states, (last, _) = net.trunk(images, positions)
    assert len(states) == 3 and torch.equal(last, net(images))
    for position, state in zip(positions, states, strict=True):
        assert torch.equal(net.rest(state, position), last)


@pytest.mark.parametrize(("family", "architecture"), [key for key in STRIDES if key[1] in SPLIT])
def test_leading_groups_are_those_that_a_state_comes_from(family: str, architecture: str) -> None:
    net = made(family, architecture)
    assert net.leading(0) == []
    for position in (1, net.splits):
        net.zero_grad()
        net.trunk(torch.rand(1, 3, 32, 32), [position])[0][0].square().sum().backward()
        touched = {id(p) for p in net.parameters() if p.grad is not None}
        leading = {id(p) for p in net.leading(position)}
        assert touched == leading


def test_batch_norms_never_move() -> None:
    net = made("resnet", "scenes_resnet")
    before = net.net.bn1.running_mean.clone()
    net.train()(torch.rand(2, 3, 32, 32))
    assert torch.equal(net.net.bn1.running_mean, before) and net.training
    assert not any(module.training for module in net.modules() if isinstance(module, nn.BatchNorm2d))


def test_the_demos_resnet_has_a_million_parameters_and_small_kernels() -> None:
    net = made("resnet", "scenes_resnet")
    assert 0.9e6 < sum(p.numel() for p in net.parameters()) < 1.2e6
    assert {module.dilation for module in net.modules() if isinstance(module, nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize(
    ("title", "file", "width", "values"),
    [
        ("# PSA ResNet38 classifier", "baselines_state_dict.txt", 4096, 105_200_613),
        (f"{PPL} implicit", "ppl_state_dict.txt", 8192, 105_282_533),
        (f"{PPL} explicit", "ppl_state_dict.txt", 16384, 105_446_373),
    ],
)
def test_resnet38d_has_the_published_names_and_shapes(title: str, file: str, width: int, values: int) -> None:
    wanted = published(title, file)
    own = {name: tuple(value.shape) for name, value in resnet38d().net.state_dict().items()}
    assert own | {"fc8.weight": (20, width, 1, 1)} == wanted
    assert sum(value.numel() for value in resnet38d().net.state_dict().values()) + 20 * width == values


def test_resnet38d_lies_at_stride_8_with_taps_of_512_1024_and_4096_channels() -> None:
    net = resnet38d()
    assert (net.stride, net.dim, net.dims, net.strides) == (8, 4096, (128, 256, 512, 1024, 4096), (2, 4, 8, 8, 8))
    maps = net.eval().feature_maps(torch.rand(1, 3, 128, 96, device="meta"))
    assert [tuple(feature_map.shape) for feature_map in maps] == [
        (1, dim, 128 // stride, 96 // stride) for dim, stride in zip(net.dims, net.strides, strict=True)
    ]
    dilations = {name: module.dilation[0] for name, module in net.net.named_modules() if isinstance(module, nn.Conv2d)}
    assert {name: rate for name, rate in dilations.items() if rate > 1} == {
        "b5.conv_branch2b1": 2, "b5_1.conv_branch2a": 2, "b5_1.conv_branch2b1": 2, "b5_2.conv_branch2a": 2,
        "b5_2.conv_branch2b1": 2, "b6.conv_branch2b1": 4, "b7.conv_branch2b1": 4,
    }  # fmt: skip


@pytest.mark.parametrize("position", [2, 3, 4, 5])
def test_resnet38d_is_cut_at_all_four_places_of_the_specification(position: int) -> None:
    net = resnet38d().eval()
    (state, _), (last, _) = net.trunk(torch.rand(1, 3, 128, 128, device="meta"), [position])
    assert state.shape[1] == {2: 256, 3: 512, 4: 1024, 5: 2048}[position] and last.shape == (1, 4096, 16, 16)
    quarter = state[..., : state.shape[-2] // 2, : state.shape[-1] // 2]
    assert net.rest((quarter, None), position).shape == (1, 4096, 8, 8)


def test_shallow_taps_and_the_plain_pass_of_resnet38d_agree_on_real_numbers() -> None:
    net, images = resnet.create("resnet38d", 64, drop_path=0.0).eval(), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        maps = net.feature_maps(images)
        assert torch.equal(maps[-1], net(images)) and maps[-1].shape == (1, 4096, 2, 2)
        assert all((feature_map >= 0).all() for feature_map in maps)
        assert torch.equal(net.net.b3.normed(net.net.group(0, net.normalise(images))), maps[0])


def aliases(state: dict[str, Tensor], style: str) -> dict[str, Tensor]:
    """timm's names → one of IRN's."""
    stem = {"conv1": "0", "bn1": "1", "layer1": "4"}
    aliased = {}
    for name, value in state.items():
        head, _, tail = name.partition(".")
        stage, place = (1, stem[head]) if head in stem else (int(head[-1]), "0")
        aliased[f"{f'stage{stage}' if style == 'stage' else f'backbone.{stage - 1}'}.{place}.{tail}"] = value
    return aliased


@pytest.mark.parametrize("style", ["timm", "resnet50", "stage", "backbone", "all"])
def test_weights_load_under_each_of_irns_names(style: str, tmp_path: Path) -> None:
    first, second = made("resnet", "resnet18"), resnet.create("resnet18", 64, drop_path=0.0)
    state = first.net.state_dict()
    every = {
        "timm": dict(state),
        "resnet50": {f"resnet50.{name}": value for name, value in state.items()},
        "stage": aliases(state, "stage"),
        "backbone": aliases(state, "backbone"),
    }
    given = {name: v for state_dict in every.values() for name, v in state_dict.items()} if style == "all" else every[style]
    torch.save({f"module.{name}": v for name, v in given.items() if "num_batches" not in name}, tmp_path / "a.pth")
    resnet.load_initial(second, tmp_path / "a.pth")
    assert all(torch.equal(value, state[name]) for name, value in second.net.state_dict().items())


def test_irns_published_list_of_names_is_a_whole_resnet50() -> None:
    wanted = published("# IRN CAM classifier", "baselines_state_dict.txt")
    with torch.device("meta"):
        own = {name: tuple(v.shape) for name, v in resnet.create("resnet50", 64, drop_path=0.0).net.state_dict().items()}
    for prefix in ("resnet50.", "stage", "backbone."):
        aliased = {name: torch.empty(shape, device="meta") for name, shape in wanted.items() if name.startswith(prefix)}
        shapes = {name: tuple(value.shape) for name, value in resnet.renamed(aliased).items()}
        assert {name: shapes[name] for name in own} == own, prefix


def test_what_is_no_resnet_is_refused_with_advice(tmp_path: Path) -> None:
    for name, message in (
        ("resnet_of_nobody", r"resnet38d, scenes_resnet \(edit architecture in the recipe"),
        ("resnet18@7", "@8 or @32"),
        ("deit_tiny_patch16_224", r"backbone to vit in params\.yaml"),
        ("efficientnet_b0", "no ResNet"),
    ):
        with pytest.raises(ValueError, match=message):
            resnet.create(name, 64, drop_path=0.0)
    with pytest.raises(ValueError, match="set drop_path to 0"):
        resnet.create("resnet38d", 64, drop_path=0.1)
    net = resnet.create("resnet18", 64, drop_path=0.0)
    resnet.load_initial(net, SCRATCH)
    save_tensors(tmp_path / "x.safetensors", {"conv1.weight": torch.zeros(3)}, {})
    with pytest.raises(ValueError, match="does not fit this backbone"):
        resnet.load_initial(net, tmp_path / "x.safetensors")
