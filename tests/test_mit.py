"""The Mix Transformer and SegFormer's head give the authors' numbers under the authors' names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.nn.mit import backbone
from pipeline.nn.mit.decoder import SegFormerHead
from pipeline.training.checkpoint import save_tensors
from tests.shared_data import golden, golden_weights
from tests.toys import SCRATCH


def official() -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    file = golden("afa_model")
    return file, golden_weights(file["keys"].tolist(), file["shapes"].tolist(), int(file["seed"]))


def test_published_weights_give_the_authors_features_and_attention(tmp_path: Path) -> None:
    file, weights = official()
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "wetr_iter_18000.pth")
    net = backbone.create("mit_b1", 64, drop_path=0.1).eval()
    backbone.load_initial(net, tmp_path / "wetr_iter_18000.pth")
    with torch.no_grad():
        features, logits = net.net(torch.from_numpy(file["input"]), keep_logits=2)
    for stage in (1, 2, 3):
        np.testing.assert_allclose(
            features[stage - 1].mean((2, 3)).numpy(), file[f"feat_stage{stage}_mean"], atol=1e-4, rtol=0
        )
    np.testing.assert_allclose(features[3].numpy(), file["feat_stage4"], atol=1e-4, rtol=0)
    for block, found in zip((7, 8), logits, strict=True):
        np.testing.assert_allclose(found.numpy(), file[f"attn_logits_block{block}"], atol=5e-4, rtol=0)


def test_the_head_gives_the_authors_logits() -> None:
    file, weights = official()
    net = backbone.create("mit_b1", 64, drop_path=0.1).eval()
    net.net.load_state_dict({name.removeprefix("encoder."): v for name, v in weights.items() if name.startswith("encoder.")})
    head = SegFormerHead(net.dims, 21, width=256, dropout=0.1).eval()
    own = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith("decoder.")}
    head.load_state_dict(own | {"linear_fuse.bn.num_batches_tracked": torch.tensor(0)})
    with torch.no_grad():
        found = head(net.net(torch.from_numpy(file["input"]), keep_logits=0)[0])
    np.testing.assert_allclose(found.numpy(), file["seg_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (48, 80), (64, 32)])
def test_maps_lie_at_strides_4_8_16_and_16(size: tuple[int, int]) -> None:
    net = backbone.create("mit_b0", 64, drop_path=0.0).eval()
    features, logits = net.stages(torch.rand(2, 3, *size), keep_logits=2)
    for maps, stride, dim in zip(features, (4, 8, 16, 16), net.dims, strict=True):
        assert maps.shape == (2, dim, size[0] // stride, size[1] // stride)
    cells = size[0] * size[1] // 256
    assert [tuple(found.shape) for found in logits] == [(2, 8, cells, cells)] * 2


def test_weights_that_do_not_fit_and_sizes_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are mit_b0, mit_b1.*params\.yaml"):
        backbone.create("mit_b9", 64, drop_path=0.0)
    net = backbone.create("mit_b0", 64, drop_path=0.0)
    backbone.load_initial(net, SCRATCH)
    save_tensors(tmp_path / "b1.safetensors", backbone.create("mit_b1", 64, drop_path=0.0).net.state_dict(), {})
    with pytest.raises(ValueError, match="does not fit this backbone"):
        backbone.load_initial(net, tmp_path / "b1.safetensors")
    (tmp_path / "mit.hub").write_text("mit_b0")
    with pytest.raises(ValueError, match="no MiT"):
        backbone.load_initial(net, tmp_path / "mit.hub")
