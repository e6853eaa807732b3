"""SemPLeS' losses are the authors', its phases train what they should, and it starts from WeakTr and from nothing else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core import config
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.methods.semples import local_critic
from pipeline.methods.semples.masking import masked, random_regions, soft_masks, visible_fraction
from pipeline.methods.semples.method import (
    Method,
    Options,
    Params,
    contrastive_prompt,
    prompt_suppression,
    segment_label_matching,
)
from pipeline.methods.weaktr import method as weaktr
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import cam_network, fusion
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights, shared
from tests.toy_batches import batch
from tests.toys import SCRATCH, toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
SHAPES = {
    "one image has no tag": ((0, 0, 0), (0, 1, 1)),
    "one pair": ((0, 0, 0), (0, 1, 0)),
    "no pair": ((0, 0, 0), (0, 0, 0)),
}


def model_params(**changes: Any) -> dict[str, Any]:
    """train.semples.model of the toys; a change `a.b` goes to key b of mapping a."""
    model = toy_recipe("semples")["train"]["model"]
    for name, value in changes.items():
        *path, last = name.split("__")
        at = model
        for part in path:
            at = at[part]
        at[last] = value
    return model


def small(**changes: Any) -> Method:
    torch.manual_seed(0)
    method = Method(LABELS, config.parse(Params, model_params(**changes), "train.model"), SCHEDULE, vit)
    with torch.no_grad():  # alike tokens would hide mistakes of order
        method.backbone.net.cls_token.normal_()
    method.load_initial(vit, SCRATCH)
    if method.local_critic is not None:
        make_texts_match_images(method)
    return method


@torch.no_grad()
def make_texts_match_images(method: Method) -> None:
    """Inverts a critic of random weights whose cosines lie below 0 on average: clamped losses have no gradient there."""
    critic = method.critic()
    texts = critic.mean_texts(method.texts.sentences.of_classes())
    if (critic.embed_images(critic.prepare(batch().images)) @ texts.t()).mean() < 0:
        critic.net.get_parameter("visual.proj.weight").neg_()


def clock_of(method: Method, name: str) -> Clock:
    """The first step of the phase of that name."""
    return Clock([phase.name for phase in method.phases()].index(name), 0, 10)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Golden:
    """golden/README.md, section 7: the critic is replaced by linear functions."""

    def __init__(self) -> None:
        self.file = {name: torch.from_numpy(np.asarray(value)) for name, value in golden("semples_losses").items()}
        self.images = F.interpolate(self.file["samples_16"], scale_factor=14, mode="nearest")
        self.pairs = self.file["pair_image_class"]
        self.texts = F.normalize(self.file["text_vectors"], dim=1)[self.pairs[:, 1]]
        self.cams = self.file["cams"].clone().requires_grad_()
        self.vectors = self.file["prompts"].clone().requires_grad_()
        prompts = self.vectors.flatten(1) @ self.file["W_prompt"] + self.file["b_prompt"]
        self.prompts = F.normalize(prompts, dim=1)[self.pairs[:, 1]]

    def embedded(self, eps: float, name: str) -> tuple[Tensor, Tensor]:
        """Unit vectors of the masked-in and the masked-out images; their masks are checked on the way."""
        masks = soft_masks(self.cams[self.pairs[:, 0], self.pairs[:, 1]], (224, 224), eps=eps, contrast="absolute")
        np.testing.assert_allclose(
            masks.detach()[:, ::4, ::4].numpy(), self.file[f"masks_{name}_ds4"].numpy(), atol=1e-5, rtol=0
        )

        def embed(visible: Tensor) -> Tensor:
            vectors = F.avg_pool2d(masked(self.images, self.pairs[:, 0], visible), 28).flatten(1)
            return F.normalize(vectors @ self.file["W_image"] + self.file["b_image"], dim=1)

        return embed(masks), embed(1 - masks)

    def compare(self, name: str, actual: Tensor, *, atol: float) -> None:
        np.testing.assert_allclose(actual.detach().numpy(), self.file[name].numpy(), atol=atol, rtol=0, err_msg=name)

    def compare_gradient(self, name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.compare(name, leaf.grad, atol=2e-5 * float(self.file[name].abs().max()))


def test_matching_is_that_of_the_authors() -> None:
    case = Golden()
    inside, outside = case.embedded(0.1, "eps0p1")
    case.compare("slm_sim_fg_text", (inside * case.texts).sum(dim=1), atol=1e-6)
    case.compare("slm_sim_bg_text", (outside * case.texts).sum(dim=1), atol=1e-6)
    weight = float(case.file["slm_l_bg"])
    losses = segment_label_matching(inside, outside, case.texts, background_weight=weight)
    case.compare("slm_term_match", losses["matching"], atol=1e-5)
    case.compare("slm_term_bg", losses["background"] / weight, atol=1e-5)
    case.compare("slm_loss", total(losses), atol=1e-5)
    total(losses).backward()
    case.compare_gradient("slm_grad_cams", case.cams)


def test_prompt_learning_is_that_of_the_authors() -> None:
    case = Golden()
    _, outside = case.embedded(1e-4, "eps1em4")
    case.compare("cpl_sim_bg_prompt", (outside * case.prompts).sum(dim=1), atol=1e-6)
    case.compare("cpl_sim_text_prompt", (case.texts * case.prompts).sum(dim=1), atol=1e-6)
    losses = contrastive_prompt(outside.detach(), case.texts, case.prompts, text_weight=float(case.file["cpl_l_T"]))
    case.compare("cpl_loss", total(losses), atol=1e-5)
    total(losses).backward()
    case.compare_gradient("cpl_grad_prompts", case.vectors)


def test_suppression_is_that_of_the_authors() -> None:
    case = Golden()
    inside, outside = case.embedded(0.1, "eps0p1")
    case.compare("psr_sim_fg_prompt", (inside * case.prompts).sum(dim=1), atol=1e-6)
    losses = segment_label_matching(inside, outside, case.texts, background_weight=float(case.file["psr_l_bg"]))
    losses |= prompt_suppression(inside, case.prompts, weight=float(case.file["psr_l_ref"]))
    case.compare("psr_loss", total(losses), atol=1e-5)
    total(losses).backward()
    case.compare_gradient("psr_grad_cams", case.cams)
    case.compare_gradient("psr_grad_prompts", case.vectors)


def test_masks_of_relative_contrast_do_not_depend_on_the_scale_of_the_scores() -> None:
    scores = torch.rand(2, 5, 6)
    expected = soft_masks(scores, (20, 24), eps=0.1, contrast="relative")
    torch.testing.assert_close(soft_masks(1e-3 * scores, (20, 24), eps=0.1, contrast="relative"), expected)
    assert soft_masks(1e-3 * scores, (20, 24), eps=0.1, contrast="absolute").max() < 0.02
    empty = torch.zeros(1, 5, 6, requires_grad=True)
    mask = soft_masks(empty, (20, 24), eps=0.1, contrast="relative")
    mask.sum().backward()
    assert not mask.any() and empty.grad is not None and torch.isfinite(empty.grad).all()  # no evidence, no mask


def test_random_regions_lie_between_0_and_1_and_vary_in_size() -> None:
    torch.manual_seed(0)
    regions = random_regions(50, (24, 24), 6, torch.zeros(1))
    assert regions.min() >= 0 and regions.max() <= 1
    assert 0.2 < regions.mean() < 0.8 and regions.mean(dim=(1, 2)).std() > 0.1


def test_visible_fractions_of_a_region_and_of_its_complement_sum_to_1() -> None:
    torch.manual_seed(0)
    regions, evidence = torch.rand(50, 24, 24), torch.rand(50, 2, 24, 24)
    torch.testing.assert_close(visible_fraction(evidence, torch.ones(50, 24, 24)), torch.ones(50, 2))
    fractions = visible_fraction(evidence, regions) + visible_fraction(evidence, 1 - regions)
    torch.testing.assert_close(fractions, torch.ones(50, 2))
    assert not visible_fraction(torch.zeros(1, 2, 24, 24), regions[:1]).any()


TRAINED = {
    "critic": {"local_critic"},
    "align": {"head", "adaptive_attention_fusion"},
    "prompt": {"prompts"},
    "refine": {"head", "adaptive_attention_fusion"},
}


def use_texts_that_match(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the class texts by vectors between images and prompts, so that no cosine is below 0, where losses have no
    gradient."""
    critic = method.critic()
    with torch.no_grad():
        image = critic.embed_images(critic.prepare(batch().images)).mean(dim=0)
        random = torch.randn(len(LABELS), len(image), generator=torch.Generator().manual_seed(0))
        prompts = method.texts.of_prompts(critic, method.prompts)
        texts = F.normalize(F.normalize(image[None], dim=1) + F.normalize(random, dim=1) + prompts, dim=1)
    monkeypatch.setattr(method.texts, "of_classes", lambda critic: texts)


@pytest.mark.parametrize("phase", TRAINED)
def test_each_phase_trains_its_part_and_no_other(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = small(reduction=1).train()  # of few hidden units, all might be silent
    use_texts_that_match(method, monkeypatch)
    clock = clock_of(method, phase)
    grouped = {id(p) for group in method.param_groups(method.phases()[clock.phase]) for p in group.parameters}
    total(method.losses(batch(), clock)).backward()
    with_gradient = {name: p for name, p in method.named_parameters() if p.grad is not None}
    moved = {name.partition(".")[0] for name, p in with_gradient.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == TRAINED[phase]
    assert {id(p) for p in with_gradient.values()} <= grouped  # no gradient is computed for nothing
    assert {name.partition(".")[0] for name, p in method.named_parameters() if id(p) in grouped} == TRAINED[phase]


def test_refine_starts_where_weaktr_ended_and_keeps_critic_and_prompts() -> None:
    method = small()
    phases = {phase.name: phase for phase in method.phases()}
    assert list(phases) == ["critic", "align", "prompt", "refine"]
    restarted = {name for name in method.state_dict() if name.startswith(phases["refine"].restart)}
    assert restarted == {name for name in method.state_dict() if name.partition(".")[0] in TRAINED["refine"]}
    assert not any(phases[name].restart for name in ("critic", "align", "prompt"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"suppression_weight": 0.0}, ["critic", "refine"]),
        ({"prompt__source": "random"}, ["critic", "refine"]),
        ({"prompt__source": "words", "prompt__words": ["sea", "a meadow"]}, ["critic", "refine"]),
    ],
)
def test_phases_whose_result_is_not_used_are_left_out(changes: dict[str, Any], expected: list[str]) -> None:
    method = small(**changes)
    assert [phase.name for phase in method.phases()] == expected
    losses = method.losses(batch(), clock_of(method, "refine"))
    assert ("suppression" in losses) == (changes.get("suppression_weight") != 0) and torch.isfinite(total(losses))
    assert ("match_prompt" in method.inspect(batch().images)) == ("suppression" in losses)


def test_a_prompt_can_begin_as_a_phrase() -> None:
    method = small(prompt__around="background", prompt__length=1)
    with torch.no_grad():
        method.prompts.zero_()
        prompts = method.texts.of_prompts(method.critic(), method.prompts)
        phrase = method.critic().embed_texts(["a photo of background."])
    torch.testing.assert_close(prompts, phrase.expand(3, -1))
    with pytest.raises(config.ParamsError, match="null, or a phrase"):
        small(prompt__around=" ")


@pytest.mark.parametrize("phase", TRAINED)
@pytest.mark.parametrize("tags", SHAPES.values(), ids=SHAPES)
def test_batches_with_few_tags_or_none_have_the_same_losses_and_finite_gradients(
    tags: Sequence[Sequence[int]], phase: str
) -> None:
    method = small().train()
    usual = method.losses(batch(((1, 0, 0), (0, 1, 1))), clock_of(method, phase))
    losses = method.losses(batch(tags), clock_of(method, phase))
    assert list(usual) == list(losses)
    total(losses).backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    if not np.any(tags) and phase != "critic":
        assert float(total(losses).detach()) == 0 and not any(gradient.any() for gradient in gradients)


def test_an_image_without_tags_changes_nothing_in_the_means() -> None:
    method = small().eval()
    with_untagged = batch(((1, 0, 0), (0, 0, 0)))
    tagged = Batch(with_untagged.images[:1], with_untagged.tags[:1], with_untagged.valid[:1], None)
    for phase in ("align", "prompt", "refine"):
        expected = method.losses(tagged, clock_of(method, phase))
        for name, value in method.losses(with_untagged, clock_of(method, phase)).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_a_step_embeds_all_masked_images_in_one_pass_and_texts_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small().train()
    sizes: dict[str, list[int]] = {"images": [], "vit": [], "texts": []}

    def counted(name: str, function: Any) -> Any:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            sizes[name].append(len(first))
            return function(first, *rest, **named)

        return call

    critic = method.critic()
    net: Any = critic.net
    monkeypatch.setattr(critic, "embed_images", counted("images", critic.embed_images))
    monkeypatch.setattr(net, "encode_text", counted("texts", net.encode_text))
    monkeypatch.setattr(method.backbone, "forward", counted("vit", method.backbone.forward))
    for _ in range(3):
        total(method.losses(batch(), clock_of(method, "refine"))).backward()
    assert sizes["images"] == [6, 6, 6]  # three pairs, masked in and out
    assert sizes["vit"] == [2, 2, 2]
    assert sizes["texts"] == [3, 3]  # classes and prompts, at the first step alone


@torch.no_grad()
def test_the_maps_that_align_trains_are_the_score_maps() -> None:
    method, tagged = small().eval(), batch()
    critic, params, pairs = method.critic(), method.params, torch.nonzero(tagged.tags)
    scores = method.score_maps(tagged.images, Options()).scores[pairs[:, 0], pairs[:, 1]]
    masks = soft_masks(scores, (critic.side, critic.side), eps=params.masks.eps, contrast=params.masks.contrast)
    prepared = critic.prepare(tagged.images)
    inside = critic.embed_images(masked(prepared, pairs[:, 0], masks))
    outside = critic.embed_images(masked(prepared, pairs[:, 0], 1 - masks))
    texts = method.texts.of_classes(critic)[pairs[:, 1]]
    expected = segment_label_matching(inside, outside, texts, background_weight=params.background_weight)
    losses = method.losses(tagged, clock_of(method, "align"))
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, atol=1e-5, rtol=1e-4, msg=name)


def test_the_critic_is_shown_padding_as_the_mean_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small().eval()
    critic, embedded = method.critic(), []
    embed_images = critic.embed_images

    def recorded(images: Tensor) -> Tensor:
        embedded.append(images)
        return embed_images(images)

    monkeypatch.setattr(critic, "embed_images", recorded)
    method.losses(batch(padding=32), clock_of(method, "align"))
    (images,) = embedded
    assert not images[..., 32:].any() and images[..., :32].any()


def test_recomputed_attention_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for stored_bytes in (fusion.STORED_BYTES, 0):
        monkeypatch.setattr(fusion, "STORED_BYTES", stored_bytes)
        method = small(reduction=1).eval()
        total(method.losses(batch(), clock_of(method, "align"))).backward()
        gradients.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    stored, recomputed = gradients
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=5e-3 * float(gradient.abs().max()), rtol=0, msg=name)


@pytest.mark.parametrize("phase", TRAINED)
def test_the_same_seed_gives_the_same_losses(phase: str) -> None:
    losses = []
    for _ in range(2):
        method = small().train()
        torch.manual_seed(5)
        losses.append(method.losses(batch(), clock_of(method, phase)))
    assert all(torch.equal(losses[0][name], value) for name, value in losses[1].items())


def test_a_local_critic_learns_classes_and_background() -> None:
    """With a ViT that can see: a red or a blue square matches its class, and what is left without it the text for the
    background."""
    method = small(local_critic__views=4, local_critic__image_size=32).train()
    pretrained = vit.create("scenes_vit", 32, drop_path=0.0)
    vit.load_initial(pretrained, SCRATCH.with_name("scenes_vit.fp16.safetensors"))
    critic, params = method.critic(), method.params.local_critic
    assert params is not None
    critic.net.get_submodule("visual.net").load_state_dict(pretrained.net.state_dict())
    images, scores, tags = torch.full((8, 3, 32, 32), 0.5), torch.zeros(8, 3, 32, 32), torch.zeros(8, 3)
    for index in range(8):
        top, left, label = 16 * (index % 2), 8 * (index // 4) + 4, index // 2 % 2
        images[index, 2 * label, top : top + 16, left : left + 16] = 1.0
        scores[index, label, top : top + 16, left : left + 16] = 1.0
        tags[index, label] = 1
    training = local_critic.CriticBatch(critic.prepare(images), torch.ones(8, 32, 32), scores, tags)
    optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(100):
        optimiser.zero_grad()
        texts = method.texts.with_background(critic, params.background)
        local_critic.matching_loss(critic, params, training, texts).backward()
        optimiser.step()
    with torch.no_grad():
        texts, masks = method.texts.with_background(critic, params.background), scores.amax(dim=1)
        inside = critic.embed_images(training.images * masks[:, None]) @ texts.t()
        outside = critic.embed_images(training.images * (1 - masks[:, None])) @ texts.t()
    own, other = tags[:, :3].bool(), torch.cat([tags[:, [1, 0]], tags[:, 2:]], dim=1).bool()
    assert (inside[:, :3][own] > inside[:, :3][other] + 0.3).all()
    assert (inside[:, :3][own] > outside[:, :3][own] + 0.3).all()
    assert (outside[:, 3] > local_critic.MATCH_THRESHOLD).all() and outside[:, 3].mean() > inside[:, 3].mean()


def test_targets_of_masked_views_follow_tags_and_visible_background() -> None:
    params = small().params.local_critic
    assert params is not None
    scores = torch.zeros(2, 3, 32, 32)
    scores[0, 0, :16], scores[1, 1, :, 16:] = 1, 1
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    torch.manual_seed(0)
    images, valid = torch.ones(2, 3, 32, 32), torch.ones(2, 32, 32)
    views, targets = local_critic.masked_views(local_critic.CriticBatch(images, valid, scores, tags), params)
    assert views.shape == (2 * params.views, 3, 32, 32) and targets.shape == (2 * params.views, 4)
    assert targets.min() >= 0 and targets.max() <= 1 and not targets[:, 2].any()  # no image shows the third class
    untagged = local_critic.CriticBatch(images, valid, 0 * scores, 0 * tags)
    targets = local_critic.masked_views(untagged, params)[1]
    assert not targets[:, :3].any() and targets[:, 3].any()  # without a tag, all is background
    padding = local_critic.CriticBatch(images, 0 * valid, 0 * scores, 0 * tags)
    views, targets = local_critic.masked_views(padding, params)
    assert not views.any() and not targets.any()


# initial weights

NETWORK_PARAMS = [field.name for field in dataclasses.fields(cam_network.CamParams)]


def trained_weaktr(path: Path, names: Sequence[str] = LABELS.names, **changes: Any) -> weaktr.Method:
    """A model.safetensors as stage train writes it."""
    values = (
        {name: value for name, value in model_params().items() if name in NETWORK_PARAMS}
        | changes
        | {"backbone_lr_factor": 0.1}
    )
    torch.manual_seed(7)
    method = weaktr.Method(LabelSpace(tuple(names)), config.parse(weaktr.Params, values, "model"), SCHEDULE, vit)
    with torch.no_grad():
        method.backbone.net.cls_token.normal_()
    section = json.dumps({"model": values})
    save_tensors(path, method.state_dict(), {"plugin": "weaktr", "labels": json.dumps(list(names)), "section": section})
    return method.eval()


def test_score_maps_start_as_those_of_weaktr_and_are_inspected_beside_the_refined_ones(tmp_path: Path) -> None:
    before = trained_weaktr(tmp_path / "model.safetensors")
    method = small().eval()
    method.load_initial(vit, tmp_path / "model.safetensors")
    images = batch().images
    expected = before.score_maps(images, weaktr.Options())
    maps = method.score_maps(images, Options())
    assert torch.equal(maps.scores, expected.scores) and torch.equal(maps.tag_logits, expected.tag_logits)
    with torch.no_grad():
        method.head.weight.normal_()
    inner = method.inspect(images)
    torch.testing.assert_close(inner["start"], expected.scores)
    assert not torch.allclose(inner["fine"], expected.scores)
    assert inner["match_inside"].shape == inner["match_outside"].shape == inner["match_prompt"].shape == (2, 3)


def test_the_local_critic_starts_with_the_vit_of_weaktr(tmp_path: Path) -> None:
    trained_weaktr(tmp_path / "model.safetensors")
    method = small()
    method.load_initial(vit, tmp_path / "model.safetensors")
    net, tower = method.backbone.net, method.critic().net.get_submodule("visual.net")
    assert torch.equal(tower.get_parameter("blocks.0.attn.qkv.weight"), net.blocks[0].attn.qkv.weight)
    assert torch.equal(tower.get_parameter("cls_token"), net.cls_token.mean(dim=1, keepdim=True))


def test_a_finished_model_can_be_loaded_whole(tmp_path: Path) -> None:
    method = small()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_()
    save_tensors(tmp_path / "model.safetensors", method.state_dict(), {})
    again = small()
    again.load_initial(vit, tmp_path / "model.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items())


def test_files_without_a_weaktr_or_with_another_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, vit.create("scenes_vit", 64, drop_path=0.0).net.state_dict(), {})
    with pytest.raises(ValueError, match=r"holds no WeakTr.*methods\.<run>\.init.*weaktr run.*params\.yaml"):
        small().load_initial(vit, path)
    trained_weaktr(path, token_weight="each")
    with pytest.raises(ValueError, match=r"was trained with token_weight 'each', not 'one': .*train\.model of the recipe"):
        small().load_initial(vit, path)
    trained_weaktr(path, names=("disc", "star", "square"))
    with pytest.raises(ValueError, match=r"knows the classes disc, star, square; the data set has disc, square, star"):
        small().load_initial(vit, path)


def test_a_fusion_of_true_heads_starts_from_random_weights(tmp_path: Path) -> None:
    before = trained_weaktr(tmp_path / "model.safetensors")
    method = small(fusion_features="heads").eval()
    initial = {name: value.clone() for name, value in method.adaptive_attention_fusion.state_dict().items()}
    method.load_initial(vit, tmp_path / "model.safetensors")
    assert all(torch.equal(value, initial[name]) for name, value in method.adaptive_attention_fusion.state_dict().items())
    assert torch.equal(method.head.weight, before.head.weight)


def test_a_fusion_of_true_heads_reads_the_channels_of_each_head_in_order() -> None:
    pooled = torch.arange(4.0 * 8).view(1, 4, 8)  # one image, four layers, two heads of four channels
    interleaved, by_head = (
        fusion.AttentionFusion(8, 2, 4, reduction=1, feature_reduction=1, pool="max", split=split)
        for split in ("interleaved", "heads")
    )
    by_head.load_state_dict(interleaved.state_dict())
    reordered = pooled.view(1, 4, 2, 4).transpose(2, 3).reshape(1, 4, 8)  # head after head → channel by channel
    torch.testing.assert_close(by_head(pooled), interleaved(reordered))
    assert not torch.allclose(by_head(pooled), interleaved(pooled))


def official(classes: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights under the names and of the shapes that the authors published, and a prompt file; both made up."""
    blocks = (
        shared("methods", "semples_state_dict.txt").read_text(encoding="utf-8").split("# SemPLeS/WeakTr mask generator, ")
    )
    listed = next(block for block in blocks if block.startswith(classes))
    rows = [line.split("\t") for line in listed.partition("\n\n")[0].splitlines() if line.count("\t") == 2]
    shapes = {name: "x".join(shape.strip("(),").replace(" ", "").split(",")) for name, shape, _ in rows}
    state = golden_weights(list(shapes), list(shapes.values()), 1)
    return state, {"prompts": torch.rand(len(state["head.bias"]), 30, 512)}


@pytest.mark.parametrize(("classes", "count", "pool"), [("VOC", 20, "max"), ("COCO", 80, "avg")])
def test_the_authors_checkpoints_and_prompts_can_be_used(classes: str, count: int, pool: str) -> None:
    state, prompts = official(classes)
    method = Method.from_official({"model": state, "epoch": 3, "miou": 0.7}, prompts)
    assert len(method.head.weight) == len(method.prompts) == count and method.cam.attention_pool == pool
    assert method.params.prompt.official_tokens
    used = [0, 1, -1] if classes == "VOC" else [0, 1, 89]  # ids 1, 2 and the last
    assert torch.equal(method.prompts[[0, 1, -1]], prompts["prompts"][used])
    images = torch.rand(1, 3, 224, 224)
    maps = method.score_maps(images, Options()).scores  # no critic is at hand, and none is needed
    assert maps.shape == (1, count, 14, 14)
    if classes == "VOC":
        torch.testing.assert_close(maps, weaktr.Method.from_official(state).score_maps(images, weaktr.Options()).scores)
    with pytest.raises(ValueError, match=r"prompts` of shape .*in the recipe"):
        Method.from_official(state, {"prompts": torch.rand(3, 30, 512)})


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("one of critic and local_critic must be null", {"local_critic": None}),
        (r"templates \['a photo'\]", {"templates": ["a photo"]}),
        ("words are for source words", {"prompt__source": "words"}),
        ("file is for source file", {"prompt__source": "file"}),
        ("belong to a published critic", {"prompt__official_tokens": True}),
    ],
)
def test_params_that_contradict_each_other_are_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(config.ParamsError, match=message):
        small(**changes)


def test_names_of_classes_that_the_data_set_has_not_are_refused() -> None:
    with pytest.raises(ValueError, match=r"names has cat; the classes are disc, square, star"):
        small(names={"cat": ["kitten"]})
