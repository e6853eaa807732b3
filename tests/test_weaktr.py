"""WeakTr's step 1 gives the authors' maps, losses and gradients; the three recorders of attention maps agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract
from pipeline.jobs import score_maps
from pipeline.methods.weaktr.method import Method, Options, Params
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import coco_ids, fusion
from pipeline.nn.vit.class_tokens import ClassTokenVit
from pipeline.segmenters.vit.segmenter import Segmenter
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights
from tests.toys import toy_recipe


def official(variant: str) -> tuple[Method, dict[str, np.ndarray]]:
    file = golden("weaktr_model")
    state = golden_weights(file["keys"], file["shapes"], int(file["seed"]))
    if variant == "ovr":
        state |= {
            name.removeprefix("override."): torch.from_numpy(file[name]) for name in file if name.startswith("override.")
        }
    return Method.from_official(state), file


def images_of(method: Method, normalised: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(normalised) * method.backbone.normalise.std + method.backbone.normalise.mean


@pytest.mark.parametrize("variant", ["base", "ovr"])
@pytest.mark.parametrize("shape", ["rect", "square"])
def test_every_inner_map_is_that_of_the_authors(variant: str, shape: str) -> None:
    method, file = official(variant)
    inner = method.inspect(images_of(method, file[f"input_{shape}"]))
    weights = inner["fusion_weights"].transpose(1, 2).flatten(1)
    assert method.stride == 16
    maps = {
        "cls_logits": (inner["cls_logits"], 1e-4),
        "coarse_logits": (inner["coarse_logits"], 5e-4),
        "fine_logits": (inner["fine_logits"], 2e-6),
        "coarse_cam": (inner["coarse"], 5e-4),
        "cross_attn": (inner["cross"], 1e-6),
        "fused_cam": (inner["fused"], 2e-6),
        "patch_attn": (inner["patch_attention"], 1e-6),
        "fine_cam": (inner["fine"], 2e-6),
        "aaf_weights": (weights, 2e-5),
    }
    for name, (value, tolerance) in maps.items():
        np.testing.assert_allclose(value.numpy(), file[f"{variant}_{shape}_{name}"], atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("variant", ["base", "ovr"])
def test_losses_and_gradients_are_those_of_the_authors(variant: str) -> None:
    method, file = official(variant)
    images = images_of(method, file["input_rect"])
    valid = torch.ones(1, *images.shape[-2:], dtype=torch.bool)
    losses = method.losses(Batch(images, torch.from_numpy(file["labels"]), valid, None), Clock(0, 0, 1))
    for ours, theirs in {"class_tokens": "cls", "coarse": "coarse", "fine": "fine"}.items():
        np.testing.assert_allclose(losses[ours].item(), file[f"{variant}_loss_{theirs}"], atol=1e-5, rtol=0)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name.removeprefix("backbone.net."): p.grad for name, p in method.named_parameters()}
    names = [name for name in file if name.startswith(f"{variant}_grad.")]
    assert len(names) == 11
    for name in names:
        ours = gradients[name.removeprefix(f"{variant}_grad.")].numpy()
        np.testing.assert_allclose(ours, file[name], atol=1e-4 * np.abs(file[name]).max(), rtol=0, err_msg=name)
    norm = gradients["head.weight"].norm().item()
    np.testing.assert_allclose(norm, file[f"{variant}_grad_norm_head.weight"], rtol=1e-4)


LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)


def small(**changes: Any) -> Method:
    model = toy_recipe("weaktr")["train"]["model"]
    torch.manual_seed(0)
    method = Method(LABELS, config.parse(Params, model | changes, "train.weaktr.model"), SCHEDULE, vit)
    with torch.no_grad():  # alike tokens would hide mistakes of order
        method.backbone.net.cls_token.normal_()
    return method


def tagged_batch(size: int = 64, padding: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    valid = torch.ones(2, size, size, dtype=torch.bool)
    if padding:
        valid[:, :, -padding:] = False
    return Batch(torch.rand(2, 3, size, size, generator=generator), torch.tensor([[1.0, 0, 0], [0, 1, 1]]), valid, None)


@pytest.mark.parametrize("attention", ["fused", "cross", "patch"])
@pytest.mark.parametrize("patch_refine", [True, False])
@pytest.mark.parametrize("token_weight", ["each", "one"])
def test_training_on_attention_rows_gives_the_logits_of_whole_maps(
    attention: str, patch_refine: bool, token_weight: str
) -> None:
    method = small(attention=attention, patch_refine=patch_refine, token_weight=token_weight).eval()
    batch = tagged_batch()
    losses, inner = method.losses(batch, Clock(0, 0, 1)), method.inspect(batch.images)
    for name, logits in {"fine": "fine_logits", "coarse": "coarse_logits", "class_tokens": "cls_logits"}.items():
        expected = torch.nn.functional.multilabel_soft_margin_loss(inner[logits], batch.tags)
        torch.testing.assert_close(losses[name], expected, atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 6), width=st.integers(1, 6), images=st.integers(1, 3))
def test_recomputed_attention_gives_the_maps_of_stored_attention(height: int, width: int, images: int) -> None:
    method = small().eval()
    photographs = torch.rand(images, 3, 8 * height, 8 * width)
    stored = method.inspect(photographs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion, "STORED_BYTES", 0)
        patch.setattr(fusion, "RECOMPUTED_ROWS", 5)
        recomputed = method.inspect(photographs)
    for name, value in stored.items():
        torch.testing.assert_close(recomputed[name], value, atol=1e-5, rtol=1e-4, msg=name)
    rows = stored["patch_attention"].sum(dim=2)
    assert (rows > 0).all() and (rows < 1).all()  # weights and probabilities are below 1


def test_the_fine_loss_trains_the_fusion_alone_and_the_others_leave_it_alone() -> None:
    for names, in_fusion in ((("fine",), True), (("class_tokens", "coarse"), False)):
        method = small(reduction=1)  # of few hidden units, all might be silent
        losses = method.losses(tagged_batch(), Clock(0, 0, 1))
        torch.stack([losses[name] for name in names]).sum().backward()
        moved = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert moved and all(name.startswith("adaptive_attention_fusion.") == in_fusion for name in moved)


def test_padding_takes_no_part_in_the_pooled_maps() -> None:
    method = small(attention="patch", patch_refine=False, pool="gap").eval()
    with torch.no_grad():
        method.head.weight.zero_()
        method.head.bias.fill_(2.0)
    losses = method.losses(tagged_batch(padding=32), Clock(0, 0, 1))
    torch.testing.assert_close(losses["fine"], losses["coarse"])  # both means are 2 over what is no padding


def test_the_affinity_is_the_symmetric_patch_attention_and_only_computed_where_it_is_asked_for() -> None:
    method, pictures = small().eval(), torch.rand(2, 3, 24, 32)
    assert method.score_maps(pictures, Options()).affinity is None
    affinity = method.score_maps(pictures, Options(), keep_affinity=True).affinity
    attention = method.inspect(pictures)["patch_attention"]
    assert affinity is not None and affinity.shape == (2, 12, 12)
    torch.testing.assert_close(affinity, (attention + attention.transpose(1, 2)) / 2)


def test_an_image_keeps_the_affinity_of_its_last_scale_with_its_grid() -> None:
    settings = Extract((1.0, 1.5), None, True, "weaktr", 4, 8, 0.5, True, "fp32", 64, "gzip", 0, {})
    record = ImageRecord("x", "", (32, 48), "train", (0, 2), b"")
    maps = score_maps.score([np.zeros((32, 48, 3), np.uint8)], [record], small().eval(), Options(), settings, "cpu")[0]
    assert maps["grid"].tolist() == [6, 9] and maps["affinity"].shape == (54, 54)
    np.testing.assert_array_equal(maps["affinity"], maps["affinity"].T)


def test_half_precision_changes_maps_and_losses_but_little() -> None:
    method, batch = small().eval(), tagged_batch()
    exact, losses = method.score_maps(batch.images, Options()).scores, method.losses(batch, Clock(0, 0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, rough = method.score_maps(batch.images, Options()).scores, method.losses(batch, Clock(0, 0, 1))
    assert half.dtype == torch.float32 and (half - exact).abs().mean() < 0.03 * exact.abs().mean()
    for name, value in losses.items():
        torch.testing.assert_close(rough[name].float(), value, atol=0.02, rtol=0)


def test_score_maps_of_many_images_are_those_of_single_images(monkeypatch: pytest.MonkeyPatch) -> None:
    method, photographs = small().eval(), torch.rand(5, 3, 48, 64)
    alone = torch.cat([method.score_maps(photographs[at : at + 1], Options()).scores for at in range(5)])
    monkeypatch.setattr(fusion, "BATCH_BYTES", 2 * fusion.bytes_of_maps(method.adaptive_attention_fusion, 51))
    torch.testing.assert_close(method.score_maps(photographs, Options()).scores, alone, atol=1e-7, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("token_weight", "same"), [("one", True), ("each", False)])
def test_class_tokens_that_weigh_as_one_leave_the_pretrained_features_as_they_were(
    token_weight: Literal["each", "one"], same: bool, tmp_path: Path
) -> None:
    architecture = "deit_tiny_patch16_224"
    plain = vit.create(architecture, 64, drop_path=0.0).eval()
    save_tensors(tmp_path / "vit.safetensors", plain.net.state_dict(), {})
    network = ClassTokenVit(vit.create(architecture, 64, drop_path=0.0), 5, "normed", token_weight).eval()
    network.load_initial(tmp_path / "vit.safetensors")
    attention_fusion = small(architecture=architecture).adaptive_attention_fusion
    photographs = torch.rand(2, 3, 64, 64)
    _, patches = network(photographs, fusion.StoredAttention(attention_fusion, 5, 16, fusion.MapBuffer()))
    assert torch.allclose(patches, plain(photographs), atol=1e-4) == same


def test_class_tokens_start_from_the_vits_own_and_learn_as_fast_as_the_heads(tmp_path: Path) -> None:
    method = small()
    plain = vit.create("scenes_vit", 64, drop_path=0.0)
    torch.nn.init.normal_(plain.net.pos_embed)
    save_tensors(tmp_path / "vit.safetensors", plain.net.state_dict(), {})
    method.load_initial(vit, tmp_path / "vit.safetensors")
    own = method.backbone.net
    assert all(torch.equal(own.cls_token[:, at], plain.net.cls_token[:, 0]) for at in range(3))
    assert torch.equal(own.pos_embed[:, 3:], plain.net.pos_embed[:, 1:])
    assert all(torch.equal(own.pos_embed[:, at], plain.net.pos_embed[:, 0]) for at in range(3))
    fast = [p for group in method.param_groups(method.phases()[0]) if group.lr_factor == 1 for p in group.parameters]
    assert any(p is own.cls_token for p in fast) and not any(p is own.pos_embed for p in fast)


@pytest.mark.parametrize("architecture", ["deit_tiny_patch16_224", "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_any_vit_with_plain_attention_and_a_class_token_can_be_used(architecture: str) -> None:
    method = small(architecture=architecture, image_size=56).eval()
    side = 4 * method.stride
    assert method.score_maps(torch.rand(1, 3, side, side + method.stride), Options()).scores.shape == (1, 3, 4, 5)
    assert torch.isfinite(method.losses(tagged_batch(side), Clock(0, 0, 1))["fine"])


def test_an_architecture_whose_attention_maps_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention of this architecture.*the recipe"):
        small(architecture="eva02_tiny_patch14_224")


def test_the_authors_checkpoint_loads_with_and_without_wrapper_and_as_initial_weights(tmp_path: Path) -> None:
    file = golden("weaktr_model")
    state = golden_weights(file["keys"], file["shapes"], int(file["seed"]))
    first = Method.from_official(state)
    wrapped = Method.from_official({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3})
    assert all(torch.equal(value, wrapped.state_dict()[name]) for name, value in first.state_dict().items())
    torch.save({"model": state, "epoch": 3}, tmp_path / "checkpoint.pth")
    again = Method(LabelSpace(tuple(f"class {n}" for n in range(20))), first.params, SCHEDULE, vit)
    again.load_initial(vit, tmp_path / "checkpoint.pth")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    save_tensors(tmp_path / "ours.safetensors", again.state_dict(), {})
    again.load_initial(vit, tmp_path / "ours.safetensors")


def test_cocos_90_ids_become_its_80_classes() -> None:
    file = golden("weaktr_model")
    state = golden_weights(file["keys"], file["shapes"], int(file["seed"]))
    state["cls_token"] = torch.arange(1.0, 91).view(1, 90, 1).expand(1, 90, 384)
    state["pos_embed"] = torch.cat([state["cls_token"], state["pos_embed"][:, 20:]], dim=1)
    state["head.weight"], state["head.bias"] = (
        torch.arange(1.0, 91).view(90, 1, 1, 1).expand(90, 384, 3, 3),
        torch.arange(1.0, 91),
    )
    method = Method.from_official(state)
    used_ids = torch.tensor(coco_ids.COCO_USED_IDS, dtype=torch.float32)
    assert len(used_ids) == 80 and 91 not in used_ids and 12 not in used_ids
    for by_class in (method.backbone.net.cls_token[0, :, 0], method.backbone.net.pos_embed[0, :80, 5], method.head.bias):
        assert torch.equal(by_class, used_ids)
    assert method.backbone.net.pos_embed.shape[1] == 80 + 196


def test_a_wrong_file_says_which_keys_miss(tmp_path: Path) -> None:
    file = golden("weaktr_model")
    state = golden_weights(file["keys"], file["shapes"], int(file["seed"]))
    with pytest.raises(ValueError, match=r"attn_head_ffn\.0\.weight, .*missing"):
        Method.from_official({name: value for name, value in state.items() if "fusion" not in name})
    broken = {name: value for name, value in state.items() if name != "blocks.3.attn.qkv.bias"} | {"extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"blocks\.3\.attn\.qkv\.bias is missing; extra is unknown"):
        Method.from_official(broken)
    torch.save({"model": broken}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"broken\.pth does not fit: .*patch_embed"):
        small().load_initial(vit, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"decoder\.cls_emb missing"):
        Segmenter.from_official(state)
