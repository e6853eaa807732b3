"""ResNet + DeepLab heads: any size, known pixels alone, whole files, and the same result however a batch is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.nn.resnet import backbone
from pipeline.segmenters.resnet import segmenter as resnet
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.toys import toy_recipe

HEADS = ["deeplab_v2", "deeplab_v3plus"]


def segmenter(**changes: Any) -> resnet.Segmenter:
    model = toy_recipe("ppl")["retrain"]["model"] | changes
    schedule = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    torch.manual_seed(0)
    return resnet.Segmenter(LabelSpace(("disc", "square")), parse(resnet.Params, model, "model"), schedule, backbone)


def batch(masks: torch.Tensor) -> Batch:
    b = len(masks)
    images = torch.rand(b, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.zeros(b, 2), torch.ones(b, 32, 32, dtype=torch.bool), masks)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("architecture", ["scenes_resnet", "resnet18"])
@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 96)])
def test_images_of_any_size_are_labelled(head: str, architecture: str, size: tuple[int, int]) -> None:
    network = segmenter(head=head, architecture=architecture).eval()
    assert network.segment(torch.rand(2, 3, *size), resnet.Options()).shape == (2, 3, *size)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("balance", ["pixels", "background_foreground"])
def test_it_learns_from_known_pixels_alone(head: str, balance: str) -> None:
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    for labels, learns in ((masks, True), (torch.full_like(masks, IGNORE), False)):
        model = segmenter(head=head, balance=balance).train()
        loss = model.losses(batch(labels), Clock(0, 0, 1))["segmentation"]
        loss.backward()
        gradients = [p.grad for p in model.decoder.parameters() if p.grad is not None]
        assert torch.isfinite(loss) and gradients and any(g.abs().sum() > 0 for g in gradients) is learns


@pytest.mark.parametrize("head", HEADS)
def test_a_few_steps_lower_the_loss(head: str) -> None:
    model = segmenter(head=head, dropout=0.0).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    masks = torch.zeros(2, 32, 32, dtype=torch.uint8)
    masks[:, :, 16:] = 1
    losses = []
    for _ in range(8):
        loss = model.losses(batch(masks), Clock(0, 0, 1))["segmentation"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("head", HEADS)
def test_an_image_in_training_does_not_see_the_others_of_its_batch(head: str) -> None:
    model = segmenter(head=head, dropout=0.0).train()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        together = model.segment(images, resnet.Options())
        alone = torch.cat([model.segment(image[None], resnet.Options()) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.decoder.modules())


@pytest.mark.parametrize("head", HEADS)
def test_a_segmenter_of_ours_and_a_frozen_encoder_load(head: str, tmp_path: Path) -> None:
    first = segmenter(head=head)
    save_tensors(tmp_path / "segmenter.safetensors", first.state_dict(), {})
    second = segmenter(head=head, encoder_lr_factor=0.0)
    nn.init.zeros_(next(second.decoder.parameters()))
    second.load_initial(backbone, tmp_path / "segmenter.safetensors")
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert not any(p.requires_grad for p in second.backbone.parameters())
    assert {id(p) for group in second.param_groups(second.phases()[0]) for p in group.parameters} == {
        id(p) for p in second.decoder.parameters()
    }
    save_tensors(tmp_path / "encoder.safetensors", first.backbone.net.state_dict(), {})
    second.load_initial(backbone, tmp_path / "encoder.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"width": 60}, "multiples of 8"), ({"dilations": []}, "at least one"), ({"head": "deeplab_v1"}, "deeplab_v3plus")],
)
def test_settings_that_make_no_head_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        segmenter(**changes)
