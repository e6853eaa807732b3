"""The Mix Transformer and SegFormer's head give the authors' numbers under the authors' names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.core.config import parse
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.nn.mit import backbone
from pipeline.nn.segformer_head import SegFormerHead
from pipeline.segmenters.mit import segmenter as mit
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights
from tests.toys import SCRATCH, toy_recipe


def official() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    file = golden("afa_model")
    return file, golden_weights(file["keys"].tolist(), file["shapes"].tolist(), int(file["seed"]))


def test_published_weights_give_the_authors_features_and_attention(tmp_path: Path) -> None:
    file, weights = official()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "wetr_iter_18000.pth")
    net = backbone.create("mit_b1", 64, drop_path=0.1).eval()
    backbone.load_initial(net, tmp_path / "wetr_iter_18000.pth")
    with torch.no_grad():
        features, pairs = net.net(torch.from_numpy(file["input"]))
    for stage in (1, 2, 3):
        np.testing.assert_allclose(
            features[stage - 1].mean((2, 3)).numpy(), file[f"feat_stage{stage}_mean"], atol=1e-4, rtol=0
        )
    np.testing.assert_allclose(features[3].numpy(), file["feat_stage4"], atol=1e-4, rtol=0)
    for block, (queries, keys) in zip((7, 8), pairs, strict=True):
        np.testing.assert_allclose(
            (queries @ keys.transpose(-1, -2)).numpy(), file[f"attn_logits_block{block}"], atol=5e-4, rtol=0
        )


def test_the_head_gives_the_authors_logits() -> None:
    file, weights = official()
    net = backbone.create("mit_b1", 64, drop_path=0.1).eval()
    net.net.load_state_dict({name.removeprefix("encoder."): v for name, v in weights.items() if name.startswith("encoder.")})
    head = SegFormerHead(net.dims, 21, width=256, dropout=0.1).eval()
    own = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith("decoder.")}
    head.load_state_dict(own | {"linear_fuse.bn.num_batches_tracked": torch.tensor(0)})
    with torch.no_grad():
        logits = head(net.net(torch.from_numpy(file["input"]))[0])
    np.testing.assert_allclose(logits.numpy(), file["seg_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (64, 32)])
def test_maps_lie_at_strides_4_8_16_and_16(size: tuple[int, int]) -> None:
    net = backbone.create("mit_b0", 64, drop_path=0.0).eval()
    features, pairs = net.stages(torch.rand(2, 3, *size))
    for maps, stride, dim in zip(features, (4, 8, 16, 16), net.dims, strict=True):
        assert maps.shape == (2, dim, size[0] // stride, size[1] // stride)
    cells = size[0] * size[1] // 256
    assert [tuple(tensor.shape) for pair in pairs for tensor in pair] == [(2, 8, cells, 32)] * 4


def segmenter(**changes: Any) -> mit.Segmenter:
    model = toy_recipe("afa")["retrain"]["model"] | changes
    schedule = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    torch.manual_seed(0)
    return mit.Segmenter(LabelSpace(("disc", "square")), parse(mit.Params, model, "model"), schedule, backbone)


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (64, 96)])
def test_the_segmenter_labels_images_of_any_size(size: tuple[int, int]) -> None:
    assert segmenter().eval().segment(torch.rand(2, 3, *size), mit.Options()).shape == (2, 3, *size)


@pytest.mark.parametrize("balance", ["pixels", "background_foreground"])
def test_the_segmenter_learns_from_known_pixels_alone(balance: str) -> None:
    images = torch.rand(2, 3, 32, 32)
    tags, valid = torch.zeros(2, 2), torch.ones(2, 32, 32, dtype=torch.bool)
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    for labels, learns in ((masks, True), (torch.full_like(masks, IGNORE), False)):
        model = segmenter(balance=balance)
        loss = model.losses(Batch(images, tags, valid, labels), Clock(0, 0, 1))["segmentation"]
        loss.backward()
        gradient = model.decoder.linear_pred.weight.grad
        assert torch.isfinite(loss) and gradient is not None and bool(gradient.abs().sum() > 0) is learns


def test_a_segmenter_of_ours_and_a_frozen_encoder_load(tmp_path: Path) -> None:
    first = segmenter()
    save_tensors(tmp_path / "segmenter.safetensors", first.state_dict(), {})
    second = segmenter(encoder_lr_factor=0.0)
    second.load_initial(backbone, tmp_path / "segmenter.safetensors")
    assert torch.equal(first.decoder.linear_pred.weight, second.decoder.linear_pred.weight)
    assert not any(p.requires_grad for p in second.backbone.parameters())
    assert {id(p) for group in second.param_groups(second.phases()[0]) for p in group.parameters} == {
        id(p) for p in second.decoder.parameters()
    }


def test_weights_that_do_not_fit_and_unknown_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are mit_b0, mit_b1.*recipe"):
        backbone.create("mit_b9", 64, drop_path=0.0)
    net = backbone.create("mit_b0", 64, drop_path=0.0)
    backbone.load_initial(net, SCRATCH)
    save_tensors(tmp_path / "b1.safetensors", backbone.create("mit_b1", 64, drop_path=0.0).net.state_dict(), {})
    with pytest.raises(ValueError, match="does not fit this backbone"):
        backbone.load_initial(net, tmp_path / "b1.safetensors")
    (tmp_path / "mit.hub").write_text("mit_b0")
    with pytest.raises(ValueError, match="no MiT"):
        backbone.load_initial(net, tmp_path / "mit.hub")
