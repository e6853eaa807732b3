"""APC pools the patches that its rule chooses, runs its decoder only while it learns, and stays finite whatever a batch
holds."""

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
from pipeline.jobs import score_maps
from pipeline.methods.apc import method as apc
from pipeline.methods.apc.patch_context import PatchContext
from pipeline.methods.apc.patch_losses import classification_loss, equivariance_loss, merged_with_tags, patch_contrast
from pipeline.methods.apc.patch_pooling import Rule, adaptive_k_pooled, chosen_patches
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.toy_batches import batch
from tests.toys import toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "linear", 0, 0.0)
BACKBONES = [("vit", "scenes_vit"), ("mit", "scenes_mit"), ("resnet", "resnet18")]
WARM, LATE = Clock(0, 0, 100), Clock(0, 60, 100)  # of the decoder's iters 0.5
RULES: tuple[Rule, ...] = ("ratio", "gap", "fixed", "max")
ALL_LOSSES = {
    "warm_head": None,
    "contrast": {"weight": 0.1, "high": 0.4, "low": 0.2},
    "equivariance": {"weight": 1.0, "scale": 0.5},
}
DECODER = {
    "iters": 0.5, "weight": 0.1, "width": 16, "dropout": 0.1, "low": 0.35, "high": 0.55,
    "par": {"scale": 0.5, "dilations": [1, 2], "iterations": 2, "w1": 0.3, "w2": 0.01},
}  # fmt: skip


def parsed(**changes: Any) -> apc.Params:
    model = toy_recipe("apc")["train"]["model"]
    model |= {"architecture": "scenes_vit", "image_size": 64, "decoder": DECODER, "context": "none", **ALL_LOSSES, **changes}
    return config.parse(apc.Params, model, "model")


def made(backbone: str = "vit", architecture: str = "scenes_vit", **changes: Any) -> apc.Method:
    torch.manual_seed(0)
    return apc.Method(LABELS, parsed(architecture=architecture, **changes), SCHEDULE, plugins.load("nn", backbone))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def windowed(seed: int, b: int, gh: int, gw: int) -> Tensor:
    """bool[b,gh,gw], at least one true in each image."""
    valid = drawn(seed + 1, b, gh, gw) > 0.4
    valid[:, 0, 0] = True
    return valid


GRIDS = {"seed": st.integers(0, 999), "gh": st.integers(1, 5), "gw": st.integers(1, 5)}


@settings(max_examples=40, deadline=None)
@given(**GRIDS)
def test_one_patch_is_the_maximum_and_all_patches_are_the_mean(seed: int, gh: int, gw: int) -> None:
    scores, n = drawn(seed, 2, 3, gh, gw), gh * gw
    best = scores.flatten(2).amax(dim=2)
    torch.testing.assert_close(adaptive_k_pooled(scores, None, rule="max", ratio=0.5, k_max=7), best)
    for rule in RULES:
        torch.testing.assert_close(adaptive_k_pooled(scores, None, rule=rule, ratio=0.0, k_max=1), best)
    mean = scores.flatten(2).mean(dim=2)
    torch.testing.assert_close(adaptive_k_pooled(scores, None, rule="ratio", ratio=0.0, k_max=n + 3), mean)
    torch.testing.assert_close(adaptive_k_pooled(scores, None, rule="fixed", ratio=0.9, k_max=n + 3), mean)


@settings(max_examples=60, deadline=None)
@given(**GRIDS, rule=st.sampled_from(RULES), ratio=st.floats(0, 1), k_max=st.integers(1, 30))
def test_every_rule_chooses_as_its_definition_says_and_padding_never_counts(
    seed: int, gh: int, gw: int, rule: Any, ratio: float, k_max: int
) -> None:
    scores, valid = drawn(seed, 2, 3, gh, gw), windowed(seed, 2, gh, gw)
    pooled = adaptive_k_pooled(scores, valid, rule=rule, ratio=ratio, k_max=k_max)
    chosen = chosen_patches(scores, valid, rule=rule, ratio=ratio, k_max=k_max)
    assert not (chosen * ~valid[:, None]).any()
    for row in range(2):
        for c in range(3):
            best = np.sort(scores[row, c][valid[row]].numpy())[::-1]
            few = best[:k_max]
            steps = best[: min(k_max, len(best) - 1)] / best[1 : k_max + 1]
            k = {
                "ratio": int((few >= np.float32(ratio) * best[0]).sum()),
                "gap": int(steps.argmax()) + 1 if len(steps) else 1,
                "fixed": len(few),
                "max": 1,
            }[rule]
            assert chosen[row, c].sum() == k
            np.testing.assert_allclose(pooled[row, c], best[:k].mean(), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_reaches_exactly_the_chosen_patches(rule: Any) -> None:
    scores, valid = drawn(3, 2, 3, 4, 5).requires_grad_(), windowed(3, 2, 4, 5)
    adaptive_k_pooled(scores, valid, rule=rule, ratio=0.7, k_max=6).sum().backward()
    chosen = chosen_patches(scores.detach(), valid, rule=rule, ratio=0.7, k_max=6)
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, chosen / chosen.sum(dim=(2, 3), keepdim=True))


@pytest.mark.parametrize("rule", RULES)
def test_an_image_that_is_all_padding_scores_nothing(rule: Any) -> None:
    scores = drawn(0, 1, 2, 3, 3).requires_grad_()
    pooled = adaptive_k_pooled(scores, torch.zeros(1, 3, 3, dtype=torch.bool), rule=rule, ratio=1.0, k_max=4)
    pooled.sum().backward()
    assert pooled.tolist() == [[0, 0]] and scores.grad is not None and not scores.grad.any()


def pairwise(features: Tensor, scores: Tensor, tags: Tensor, valid: Tensor, high: float, low: float) -> Tensor:
    """The definition of the contrast, with every pair."""
    terms = []
    for row, column in torch.nonzero(tags).tolist():
        units = F.normalize(features[row].flatten(1), dim=0).T
        alike = (1 + units @ units.T) / 2
        class_scores, real = scores[row, column].flatten(), valid[row].flatten()
        confident, doubtful = (class_scores > high) & real, (class_scores < low) & real
        if not confident.any() or not doubtful.any():
            continue
        within = (1 - alike)[confident][:, confident][~torch.eye(int(confident.sum()), dtype=torch.bool)]
        terms.append((within.mean() if len(within) else 0) + alike[confident][:, doubtful].mean())
    return torch.stack(terms).mean() if terms else features.sum() * 0


@settings(max_examples=60, deadline=None)
@given(**GRIDS, high=st.floats(0.3, 0.95), low=st.floats(0.05, 0.3), tags=st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_contrast_is_that_of_all_pairs(seed: int, gh: int, gw: int, high: float, low: float, tags: list[bool]) -> None:
    features = (drawn(seed, 2, 6, gh, gw) - 0.5).requires_grad_()
    scores, valid = drawn(seed + 5, 2, 4, gh, gw), windowed(seed, 2, gh, gw)
    asked = torch.tensor(tags).view(2, 4).float()
    ours, theirs = (
        patch_contrast(features, scores, asked, valid, high=high, low=low),
        pairwise(features, scores, asked, valid, high, low),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert 0 <= ours <= 2 + 1e-5
    ours_grad, their_grad = (torch.autograd.grad(loss, features)[0] for loss in (ours, theirs))
    torch.testing.assert_close(ours_grad, their_grad, atol=1e-5, rtol=1e-3)


def test_the_contrast_is_nought_and_has_a_gradient_path_where_no_class_counts() -> None:
    features, valid = torch.zeros(2, 5, 3, 3, requires_grad=True), torch.ones(2, 3, 3, dtype=torch.bool)
    scores = drawn(0, 2, 4, 3, 3)
    for tags, high, low in ((torch.zeros(2, 4), 0.5, 0.1), (torch.ones(2, 4), 1.0, 0.1), (torch.ones(2, 4), 0.5, 0.0)):
        loss = patch_contrast(features, scores, tags, valid, high=high, low=low)
        loss.backward()
        assert loss == 0 and features.grad is not None and torch.isfinite(features.grad).all()


def test_a_patch_of_zeros_is_like_no_other() -> None:
    features = torch.tensor([[[1.0, 0, 1, -1]], [[0.0, 0, 0, 0]]])[None]
    scores, tags = torch.tensor([[[[0.9, 0.9, 0.9, 0.1]]]]), torch.ones(1, 1)
    loss = patch_contrast(features, scores, tags, None, high=0.5, low=0.2)
    torch.testing.assert_close(loss, pairwise(features, scores, tags, torch.ones(1, 1, 4, dtype=torch.bool), 0.5, 0.2))


def test_classes_that_are_not_tagged_do_not_change_the_contrast() -> None:
    features, scores, valid = drawn(0, 1, 6, 4, 4), drawn(1, 1, 3, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    few = patch_contrast(features, scores, torch.tensor([[0.0, 1, 0]]), valid, high=0.6, low=0.3)
    alone = patch_contrast(features, scores[:, 1:2], torch.ones(1, 1), valid, high=0.6, low=0.3)
    torch.testing.assert_close(few, alone)


@pytest.mark.parametrize("context", ["none", "bilstm"])
@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
def test_the_decoder_starts_at_its_warm_up(backbone: str, architecture: str, context: str) -> None:
    method = made(backbone, architecture, context=context, context_width=8).train()
    before = ["classification", "classifier_l2", "contrast", "equivariance"]
    assert list(method.losses(batch(), WARM)) == before
    losses = method.losses(batch(padding=16), LATE)
    assert list(losses) == [*before, "segmentation"]
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)
    for part in filter(None, (method.classifier, method.decoder, method.backbone, method.context)):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_the_decoder_costs_nothing_before_its_warm_up_and_nothing_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = made()

    def refuse(*given: Any, **more: Any) -> None:
        raise RuntimeError("not needed yet")

    assert method.decoder is not None
    monkeypatch.setattr(method.decoder, "forward", refuse)
    monkeypatch.setattr(method.backbone, "feature_maps", refuse)
    monkeypatch.setattr(method, "training_labels", refuse)
    method.losses(batch(), WARM)
    with pytest.raises(RuntimeError, match="not needed yet"):
        method.losses(batch(), LATE)
    without = made(decoder=None)
    monkeypatch.setattr(without.backbone, "feature_maps", refuse)
    without.losses(batch(), LATE)
    maps = without.eval().score_maps(batch().images, apc.Options("patch"))
    assert maps.decoded is None and not any(name.startswith("decoder") for name in without.state_dict())


@pytest.mark.parametrize(
    ("iters", "step", "expected"), [(0, 0, True), (0.3, 29, False), (0.3, 30, True), (5, 4, False), (5, 5, True)]
)
def test_a_warm_up_is_given_in_steps_or_as_a_fraction_of_all_steps(iters: float, step: int, expected: bool) -> None:
    method = made(decoder={**DECODER, "iters": iters})
    assert ("segmentation" in method.losses(batch(), Clock(0, step, 100))) is expected


def test_the_backbone_runs_once_for_a_step_with_decoder_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    method, calls = made(equivariance=None, dropout=0.5).train(), []
    feature_maps = method.backbone.feature_maps
    monkeypatch.setattr(method.backbone, "feature_maps", lambda images: calls.append("maps") or feature_maps(images))
    monkeypatch.setattr(method.backbone, "forward", lambda images: calls.append("forward"))
    method.losses(batch(), LATE)
    assert calls == ["maps"]


def test_labels_are_made_without_dropout() -> None:
    method, target_scores = made(dropout=0.8, equivariance=None).train(), []
    labels = method.training_labels
    method.training_labels = lambda images, scores, settings: (
        target_scores.append(scores) or labels(images, scores, settings)
    )  # type: ignore[method-assign]
    for _ in range(2):
        method.losses(batch(), LATE)
    assert torch.equal(target_scores[0], target_scores[1]) and not target_scores[0].requires_grad


def test_labels_hold_the_tags_alone_and_255_on_padding() -> None:
    method = made()
    assert method.params.decoder is not None
    labels = method.training_labels(batch(padding=20), drawn(0, 2, 3, 8, 8), method.params.decoder)
    assert set(labels[0].unique().tolist()) <= {0, 1, IGNORE} and set(labels[1].unique().tolist()) <= {0, 2, 3, IGNORE}
    assert (labels[:, :, -20:] == IGNORE).all() and (labels[:, :, :-20] != IGNORE).any()
    untagged = method.training_labels(batch(((0, 0, 0),)), drawn(0, 1, 3, 8, 8), method.params.decoder)
    assert (untagged == 0).all()


@pytest.mark.parametrize("tags", [((0, 0, 0), (0, 0, 0)), ((1, 1, 1), (0, 0, 0)), ((1, 0, 0),)])
@pytest.mark.parametrize("padding", [0, 64])
@pytest.mark.parametrize(("size", "rule"), [(16, "ratio"), (64, "gap")])
def test_losses_are_finite_without_tags_without_pixels_and_on_few_patches(
    tags: Any, padding: int, size: int, rule: str
) -> None:
    method = made(pooling={"rule": rule, "ratio": 0.9, "k_max": 24})
    for clock in (WARM, LATE):
        total = torch.stack(list(method.losses(batch(tags, size, min(padding, size)), clock).values())).sum()
        total.backward()
        assert torch.isfinite(total)
        assert all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("context", ["none", "bilstm"])
def test_losses_are_finite_in_half_precision(context: str) -> None:
    method = made(context=context, context_width=8).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method.losses(batch(padding=16), LATE)
    plain = made(context=context, context_width=8, dropout=0.0).eval().losses(batch(padding=16), LATE)
    for name, loss in losses.items():
        assert torch.isfinite(loss) and loss.dtype == torch.float32
        assert abs(loss - plain[name]) < 0.5 + 0.2 * plain[name], name


def test_certain_patches_give_finite_losses_whether_right_or_wrong() -> None:
    method = made(decoder=None)
    torch.nn.init.normal_(method.classifier.weight, std=1000.0)
    total = torch.stack(list(method.losses(batch(), WARM).values())).sum()
    total.backward()
    assert torch.isfinite(total) and all(torch.isfinite(p.grad).all() for p in method.parameters() if p.grad is not None)


def test_classification_is_binary_cross_entropy_with_background_tagged_if_asked() -> None:
    pooled, tags = drawn(0, 2, 4), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    with_background = F.binary_cross_entropy(pooled, F.pad(tags, (1, 0), value=1.0))
    torch.testing.assert_close(classification_loss(pooled, tags, background_tag="always"), with_background)
    without = F.binary_cross_entropy(pooled[:, 1:], tags)
    torch.testing.assert_close(classification_loss(pooled, tags, background_tag="none"), without)
    for tag in ("always", "none"):
        assert made(background_tag=tag).losses(batch(), WARM)["classification"] > 0


def test_the_second_views_target_is_the_first_views_mirror_image() -> None:
    logits, tags = 4 * drawn(0, 1, 4, 6, 6), torch.ones(1, 3)
    scores = logits.softmax(dim=1)
    mirrored, unmirrored = (equivariance_loss(view, scores, tags) for view in (logits.flip(-1), logits))
    assert mirrored < unmirrored


def test_padding_and_classes_that_are_not_tagged_are_no_target_of_the_second_view() -> None:
    scores, tags = drawn(0, 2, 4, 6, 6).softmax(dim=1), torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    logits = drawn(1, 2, 4, 6, 6).requires_grad_()
    equivariance_loss(logits, scores * 0, tags).backward()
    assert logits.grad is not None and not logits.grad.any()
    changed = scores.clone()
    changed[0, 2:] = 0.9
    torch.testing.assert_close(equivariance_loss(logits, changed, tags), equivariance_loss(logits, scores, tags))


def test_merging_keeps_the_tags_and_background_and_sums_to_one() -> None:
    scores = drawn(0, 1, 4, 3, 3).softmax(dim=1)
    merged = merged_with_tags(scores, torch.tensor([[0.0, 1, 0]]))
    assert not merged[:, [1, 3]].any()
    torch.testing.assert_close(merged.sum(dim=1), torch.ones(1, 3, 3))
    nothing = merged_with_tags(scores * 0, torch.ones(1, 3))
    assert not nothing.any()


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
def test_score_maps_and_tag_logits_lie_in_range(backbone: str, architecture: str) -> None:
    method = made(backbone, architecture).eval()
    maps = method.score_maps(torch.rand(2, 3, 64, 96), apc.Options("patch"))
    h, w = 64 // method.stride, 96 // method.stride
    assert maps.scores.shape == (2, 3, h, w) and maps.affinity is None and maps.decoded is not None
    assert (maps.scores >= 0).all() and (maps.scores.sum(dim=1) <= 1 + 1e-5).all()
    inner = method.inspect(torch.rand(2, 3, 64, 96))
    assert maps.tag_logits.sigmoid().amax() <= 1 and torch.isfinite(maps.tag_logits).all()
    assert inner["k"].amin() >= 1 and inner["k"].amax() <= method.params.pooling.k_max
    assert inner["chosen_patches"].shape == inner["patch_scores"].shape == (2, 3, h, w)
    torch.testing.assert_close(
        inner["tag_scores"], (inner["patch_scores"] * inner["chosen_patches"]).sum(dim=(2, 3)) / inner["k"]
    )
    torch.nn.init.constant_(method.classifier.weight, 0)
    method.classifier.weight.data[1] = 1e6
    extreme = method.score_maps(torch.rand(1, 3, 64, 64), apc.Options("patch")).tag_logits
    assert torch.isfinite(extreme).all() and extreme.abs().max() < 14


def test_the_decoders_score_maps_at_one_half_are_its_own_masks() -> None:
    maps = made().eval().score_maps(torch.rand(2, 3, 64, 96), apc.Options("decoder"))
    assert maps.decoded is not None
    assert torch.equal(F.pad(maps.scores, (0, 0, 0, 0, 1, 0), value=0.5).argmax(1), maps.decoded.argmax(1))


def test_extract_keeps_the_decoders_masks() -> None:
    image = np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8)
    extract = Extract((1.5, 1.0), None, True, "mean", 4, 8, 0.5, False, "fp32", 64, "gzip", 0, {})
    record = ImageRecord("x", "x.png", (61, 83), "train", (1,), b"")
    fields = score_maps.score([image], [record], made().eval(), apc.Options("decoder"), extract, "cpu")[0]
    assert fields["decoded"].shape == (61, 83) and set(np.unique(fields["decoded"])) <= {0, 2}


def test_a_decoders_score_map_without_a_decoder_is_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"set source to patch, or train with a decoder \(edit the recipe\)"):
        made(decoder=None).score_maps(torch.rand(1, 3, 64, 64), apc.Options("decoder"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pooling": {"rule": "mean", "ratio": 0.9, "k_max": 6}},
            r"model\.pooling\.rule: got 'mean', allowed is one of ratio, gap",
        ),
        ({"pooling": {"rule": "ratio", "ratio": 1.1, "k_max": 6}}, r"pooling\.ratio: got 1\.1"),
        ({"pooling": {"rule": "ratio", "ratio": 0.9, "k_max": 0}}, r"pooling\.k_max: got 0"),
        ({"context": "gru"}, r"model\.context: got 'gru', allowed is one of none, bilstm"),
        ({"contrast": {"weight": 0.1, "high": 0.2, "low": 0.8}}, r"model\.contrast: low 0\.8 is above high 0\.2"),
        ({"contrast": {"weight": 0.0, "high": 0.8, "low": 0.2}}, r"contrast\.weight: got 0\.0"),
        ({"decoder": {**DECODER, "low": 0.9}}, r"model\.decoder: low 0\.9 is above high 0\.55"),
        ({"decoder": {**DECODER, "start": 1}}, r"decoder\.start: unknown key"),
        ({"warm_head": {"epochs": 0, "min_steps": 0, "lr": 0.1}}, r"warm_head\.epochs: got 0"),
        ({"equivariance": {"weight": 1.0, "scale": 2.0}}, r"equivariance\.scale: got 2\.0"),
    ],
)
def test_wrong_params_are_refused_before_any_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(config.ParamsError, match=message):
        parsed(**changes)


def test_a_warm_head_trains_on_a_frozen_backbone_and_then_all_train() -> None:
    method = made(warm_head={"epochs": 0.5, "min_steps": 7, "lr": 0.01}).train()
    first, last = method.phases()
    assert (first.name, first.epochs, first.min_steps, first.lr) == ("head", 0.5, 7, 0.01) and last == SCHEDULE.phase(
        "end_to_end"
    )
    losses = method.losses(batch(), Clock(0, 90, 100))
    assert "segmentation" not in losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is None for p in method.backbone.parameters()) and method.classifier.weight.grad is not None
    warm = {id(p) for group in method.param_groups(first) for p in group.parameters}
    assert warm == {id(method.classifier.weight)}
    assert "segmentation" in method.losses(batch(), Clock(1, 60, 100))
    trained = [id(p) for group in method.param_groups(last) for p in group.parameters]
    assert set(trained) == {id(p) for p in method.parameters()} and len(set(trained)) == len(trained)


def test_the_same_seed_gives_the_same_bytes() -> None:
    def run() -> list[bytes]:
        method = made(context="bilstm", context_width=8, dropout=0.3).train()
        torch.manual_seed(1)
        losses = method.losses(batch(), LATE)
        torch.stack(list(losses.values())).sum().backward()
        return [p.grad.numpy().tobytes() for p in method.parameters() if p.grad is not None]

    assert run() == run()


def test_a_model_of_ours_starts_another_run(tmp_path: Path) -> None:
    first = made(context="bilstm", context_width=8)
    save_tensors(tmp_path / "model.safetensors", first.state_dict(), {})
    second = made(context="bilstm", context_width=8, dropout=0.5)
    torch.nn.init.zeros_(second.classifier.weight)
    second.load_initial(plugins.load("nn", "vit"), tmp_path / "model.safetensors")
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    with pytest.raises(ValueError, match=r"context\.rows\.weight_ih_l0 is unknown"):
        made().load_initial(plugins.load("nn", "vit"), tmp_path / "model.safetensors")


def test_the_context_starts_as_keras_does() -> None:
    context = PatchContext(12, 5)
    for name, value in context.named_parameters():
        if "bias_ih" in name:
            assert value.tolist() == [0] * 5 + [1] * 5 + [0] * 10
        elif "bias_hh" in name:
            assert not value.any() and not value.requires_grad
        elif "weight_hh" in name:
            torch.testing.assert_close(value.T @ value, torch.eye(5), atol=1e-5, rtol=0)
