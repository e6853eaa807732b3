"""EfficientNets of timm as backbones: maps, cuts, fixed norms, published weights; cam and ppl on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import config, plugins
from pipeline.core.contracts import Clock
from pipeline.core.labels import LabelSpace
from pipeline.nn.efficientnet import backbone as family
from pipeline.training.settings import Schedule
from tests.shared_data import shared
from tests.toy_batches import batch
from tests.toys import SCRATCH, toy_recipe

LITE = "tf_efficientnet_lite0"
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(0)
    return family.create(LITE, 64, drop_path=0.0).eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_feature_maps_have_the_channels_and_strides_that_the_backbone_states(net: Any, images: torch.Tensor) -> None:
    maps = net.feature_maps(images)
    assert [tuple(one.shape[1:]) for one in maps] == [
        (dim, 64 // stride, 96 // stride) for dim, stride in zip(net.dims, net.strides, strict=True)
    ]
    assert (net.dim, net.stride) == (1280, 16)
    torch.testing.assert_close(maps[-1], net(images))
    torch.testing.assert_close(maps[-1], net.net.forward_features(net.normalise(images)))


@torch.no_grad()
def test_a_pass_that_is_cut_anywhere_ends_where_the_whole_one_does(net: Any, images: torch.Tensor) -> None:
    positions = range(1, net.splits + 1)
    *states, last = net.trunk(images, positions)
    for position, state in zip(positions, states, strict=True):
        torch.testing.assert_close(net.rest(state, position), last[0])


def test_leading_groups_hold_all_parameters_in_the_end_and_none_at_first(net: Any) -> None:
    counts = [sum(parameter.numel() for parameter in net.leading(groups)) for groups in range(net.splits + 2)]
    assert counts[0] == 0 and counts == sorted(set(counts))
    assert counts[-1] == sum(parameter.numel() for parameter in net.parameters())


def test_batch_norms_never_move() -> None:
    net = family.create(LITE, 64, drop_path=0.0).train()
    before = {name: value.clone() for name, value in net.named_buffers() if "running" in name}
    net(torch.rand(2, 3, 64, 64))
    assert before and all(torch.equal(dict(net.named_buffers())[name], value) for name, value in before.items())


def test_published_weights_load_and_a_file_of_another_network_names_the_command(net: Any, tmp_path: Path) -> None:
    path = shared("weights", f"{LITE}.safetensors")
    made = family.create(LITE, 224, drop_path=0.0)
    family.load_initial(made, path)
    torch.testing.assert_close(made.net.conv_head.weight, load_file(path)["conv_head.weight"])
    family.load_initial(made, SCRATCH)
    with pytest.raises(ValueError, match="tag2mask weights check"):
        family.load_initial(made, shared("weights", "u2netp.safetensors"))


@pytest.mark.parametrize("method", ["cam", "ppl"])
def test_cam_and_ppl_learn_on_it(method: str) -> None:
    module = plugins.load("methods", method)
    model = toy_recipe(method)["train"]["model"] | {"architecture": LITE, "image_size": 64}
    torch.manual_seed(0)
    made = module.Method(LabelSpace(("a", "b", "c")), config.parse(module.Params, model, "model"), SCHEDULE, family).train()
    made.load_initial(family, SCRATCH)
    losses = made.losses(batch(), Clock(0, 0, 1))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in made.backbone.parameters())


@pytest.mark.parametrize("architecture", ["resnet18", "deit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_what_is_no_efficientnet_is_refused_with_advice(architecture: str) -> None:
    with pytest.raises(ValueError, match=r"set methods\.<run>\.backbone to vit or resnet"):
        family.create(architecture, 64, drop_path=0.0)
    with pytest.raises(ValueError, match="tf_efficientnet_lite0"):
        family.create("efficientnet_lite", 64, drop_path=0.0)
