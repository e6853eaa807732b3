"""SemPLeS' losses are the authors', its phases train what they should, and it starts from WeakTr and from nothing else."""

from __future__ import annotations

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
from pipeline.methods.semples.masking import blobs, masked, soft_masks, visible_share
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
from pipeline.nn.vit import fusion
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.shared_data import golden, golden_weights, shared
from tests.toy_batches import batch
from tests.toys import SCRATCH, toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(1, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
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
    made = Method(LABELS, config.parse(Params, model_params(**changes), "train.semples.model"), SCHEDULE, vit)
    with torch.no_grad():  # alike tokens would hide mistakes of order
        made.backbone.net.cls_token.normal_()
    made.load_initial(vit, SCRATCH)
    if made.local_critic is not None:
        agreeable(made)
    return made


@torch.no_grad()
def agreeable(method: Method) -> None:
    """Turns a critic of random weights round where it says that nothing matches: the losses have no gradient there."""
    critic = method._critic()
    if (critic.images(critic.prepared(batch().images)) @ critic.means(method._said.of_classes()).t()).mean() < 0:
        critic.net.get_submodule("visual.proj").weight.neg_()


def place(method: Method, phase: str) -> Clock:
    return Clock([one.name for one in method.phases()].index(phase), 0, 10)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class Golden:
    """golden/README.md, section 7: linear stand-ins for the critic."""

    def __init__(self) -> None:
        self.file = {name: torch.from_numpy(np.asarray(value)) for name, value in golden("semples_losses").items()}
        self.images = F.interpolate(self.file["samples_16"], scale_factor=14, mode="nearest")
        self.pairs = self.file["pair_image_class"]
        self.texts = F.normalize(self.file["text_vectors"], dim=1)[self.pairs[:, 1]]
        self.cams = self.file["cams"].clone().requires_grad_()
        self.vectors = self.file["prompts"].clone().requires_grad_()
        prompts = self.vectors.flatten(1) @ self.file["W_prompt"] + self.file["b_prompt"]
        self.prompts = F.normalize(prompts, dim=1)[self.pairs[:, 1]]

    def looked_at(self, eps: float, name: str) -> tuple[Tensor, Tensor]:
        """Unit vectors of the masked-in and the masked-out images; their masks are checked on the way."""
        masks = soft_masks(self.cams[self.pairs[:, 0], self.pairs[:, 1]], (224, 224), eps=eps, contrast="absolute")
        np.testing.assert_allclose(
            masks.detach()[:, ::4, ::4].numpy(), self.file[f"masks_{name}_ds4"].numpy(), atol=1e-5, rtol=0
        )

        def look(shown: Tensor) -> Tensor:
            vectors = F.avg_pool2d(masked(self.images, self.pairs[:, 0], shown), 28).flatten(1)
            return F.normalize(vectors @ self.file["W_image"] + self.file["b_image"], dim=1)

        return look(masks), look(1 - masks)

    def compare(self, name: str, found: Tensor, *, atol: float) -> None:
        np.testing.assert_allclose(found.detach().numpy(), self.file[name].numpy(), atol=atol, rtol=0, err_msg=name)

    def compare_gradient(self, name: str, of: Tensor) -> None:
        assert of.grad is not None
        self.compare(name, of.grad, atol=2e-5 * float(self.file[name].abs().max()))


def test_matching_is_that_of_the_authors() -> None:
    case = Golden()
    inside, outside = case.looked_at(0.1, "eps0p1")
    case.compare("slm_sim_fg_text", (inside * case.texts).sum(dim=1), atol=1e-6)
    case.compare("slm_sim_bg_text", (outside * case.texts).sum(dim=1), atol=1e-6)
    weight = float(case.file["slm_l_bg"])
    found = segment_label_matching(inside, outside, case.texts, background_weight=weight)
    case.compare("slm_term_match", found["matching"], atol=1e-5)
    case.compare("slm_term_bg", found["background"] / weight, atol=1e-5)
    case.compare("slm_loss", total(found), atol=1e-5)
    total(found).backward()
    case.compare_gradient("slm_grad_cams", case.cams)


def test_prompt_learning_is_that_of_the_authors() -> None:
    case = Golden()
    _, outside = case.looked_at(1e-4, "eps1em4")
    case.compare("cpl_sim_bg_prompt", (outside * case.prompts).sum(dim=1), atol=1e-6)
    case.compare("cpl_sim_text_prompt", (case.texts * case.prompts).sum(dim=1), atol=1e-6)
    found = contrastive_prompt(outside.detach(), case.texts, case.prompts, text_weight=float(case.file["cpl_l_T"]))
    case.compare("cpl_loss", total(found), atol=1e-5)
    total(found).backward()
    case.compare_gradient("cpl_grad_prompts", case.vectors)


def test_suppression_is_that_of_the_authors() -> None:
    case = Golden()
    inside, outside = case.looked_at(0.1, "eps0p1")
    case.compare("psr_sim_fg_prompt", (inside * case.prompts).sum(dim=1), atol=1e-6)
    found = segment_label_matching(inside, outside, case.texts, background_weight=float(case.file["psr_l_bg"]))
    found |= prompt_suppression(inside, case.prompts, weight=float(case.file["psr_l_ref"]))
    case.compare("psr_loss", total(found), atol=1e-5)
    total(found).backward()
    case.compare_gradient("psr_grad_cams", case.cams)
    case.compare_gradient("psr_grad_prompts", case.vectors)


def test_a_relative_contrast_does_not_mind_the_scale_of_the_scores() -> None:
    scores = torch.rand(2, 5, 6)
    wanted = soft_masks(scores, (20, 24), eps=0.1, contrast="relative")
    torch.testing.assert_close(soft_masks(1e-3 * scores, (20, 24), eps=0.1, contrast="relative"), wanted)
    assert soft_masks(1e-3 * scores, (20, 24), eps=0.1, contrast="absolute").max() < 0.02
    empty = torch.zeros(1, 5, 6, requires_grad=True)
    mask = soft_masks(empty, (20, 24), eps=0.1, contrast="relative")
    mask.sum().backward()
    assert not mask.any() and empty.grad is not None and torch.isfinite(empty.grad).all()  # no evidence, no mask


def test_random_regions_lie_in_range_and_the_visible_share_is_one_of_all() -> None:
    torch.manual_seed(0)
    found = blobs(50, (24, 24), 6, torch.zeros(1))
    assert found.min() >= 0 and found.max() <= 1 and 0.2 < found.mean() < 0.8 and found.mean(dim=(1, 2)).std() > 0.1
    evidence = torch.rand(50, 2, 24, 24)
    torch.testing.assert_close(visible_share(evidence, torch.ones(50, 24, 24)), torch.ones(50, 2))
    torch.testing.assert_close(visible_share(evidence, found) + visible_share(evidence, 1 - found), torch.ones(50, 2))
    assert not visible_share(torch.zeros(1, 2, 24, 24), found[:1]).any()


LEARNS = {
    "critic": {"local_critic"},
    "align": {"head", "adaptive_attention_fusion"},
    "prompt": {"prompts"},
    "refine": {"head", "adaptive_attention_fusion"},
}


def with_texts_that_match(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained critic may find every cosine below 0, where losses have no gradient: texts are made up between images and prompts."""
    critic = method._critic()
    with torch.no_grad():
        seen = critic.images(critic.prepared(batch().images)).mean(dim=0)
        other = torch.randn(len(LABELS), len(seen), generator=torch.Generator().manual_seed(0))
        parts = (F.normalize(seen[None], dim=1), F.normalize(other, dim=1), method._prompt_vectors(method.prompts))
        texts = F.normalize(parts[0] + parts[1] + parts[2], dim=1)
    monkeypatch.setattr(method, "_class_vectors", lambda: texts)


@pytest.mark.parametrize("phase", LEARNS)
def test_each_phase_trains_its_part_and_no_other(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = small(reduction=1).train()  # of few hidden units, all might be silent
    with_texts_that_match(method, monkeypatch)
    grouped = {id(p) for group in method.param_groups(method.phases()[place(method, phase).phase]) for p in group.parameters}
    total(method.losses(batch(), place(method, phase))).backward()
    with_gradient = {name: p for name, p in method.named_parameters() if p.grad is not None}
    moved = {name.partition(".")[0] for name, p in with_gradient.items() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == LEARNS[phase]
    assert {id(p) for p in with_gradient.values()} <= grouped  # nothing is computed that nobody uses
    assert {name.partition(".")[0] for name, p in method.named_parameters() if id(p) in grouped} == LEARNS[phase]


def test_refine_starts_where_weaktr_ended_and_keeps_critic_and_prompts() -> None:
    method = small()
    phases = {phase.name: phase for phase in method.phases()}
    assert list(phases) == ["critic", "align", "prompt", "refine"]
    again = {name for name in method.state_dict() if name.startswith(phases["refine"].restart)}
    assert again == {name for name in method.state_dict() if name.partition(".")[0] in LEARNS["refine"]}
    assert not any(phases[name].restart for name in ("critic", "align", "prompt"))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"suppression_weight": 0.0}, ["critic", "refine"]),
        ({"prompt__source": "random"}, ["critic", "refine"]),
        ({"prompt__source": "words", "prompt__words": ["sea", "a meadow"]}, ["critic", "refine"]),
    ],
)
def test_phases_that_nothing_would_read_are_left_out(changes: dict[str, Any], wanted: list[str]) -> None:
    method = small(**changes)
    assert [phase.name for phase in method.phases()] == wanted
    losses = method.losses(batch(), place(method, "refine"))
    assert ("suppression" in losses) == (changes.get("suppression_weight") != 0) and torch.isfinite(total(losses))
    assert ("match_prompt" in method.inspect(batch().images)) == ("suppression" in losses)


def test_a_prompt_can_begin_as_a_phrase() -> None:
    method = small(prompt__around="background", prompt__length=1)
    with torch.no_grad():
        method.prompts.zero_()
        found = method._prompt_vectors(method.prompts)
        wanted = method._critic().sentences(["a photo of background."])
    torch.testing.assert_close(found, wanted.expand(3, -1))
    with pytest.raises(config.ParamsError, match="null, or a phrase"):
        small(prompt__around=" ")


@pytest.mark.parametrize("phase", LEARNS)
@pytest.mark.parametrize("tags", SHAPES.values(), ids=SHAPES)
def test_images_without_tags_and_few_pairs_are_no_special_case(tags: Sequence[Sequence[int]], phase: str) -> None:
    method = small().train()
    full, some = (method.losses(batch(one), place(method, phase)) for one in (((1, 0, 0), (0, 1, 1)), tags))
    assert list(full) == list(some)
    total(some).backward()
    gradients = [p.grad for p in method.parameters() if p.grad is not None]
    assert gradients and all(torch.isfinite(one).all() for one in gradients)
    if not np.any(tags) and phase != "critic":
        assert float(total(some).detach()) == 0 and not any(one.any() for one in gradients)


def test_an_image_without_tags_changes_nothing_in_the_means() -> None:
    method = small().eval()
    two = batch(((1, 0, 0), (0, 0, 0)))
    one = Batch(two.images[:1], two.tags[:1], two.valid[:1], None)
    for phase in ("align", "prompt", "refine"):
        wanted = method.losses(one, place(method, phase))
        for name, value in method.losses(two, place(method, phase)).items():
            torch.testing.assert_close(value, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_critic_looks_once_and_the_vit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    method = small().train()
    seen: dict[str, list[int]] = {"critic": [], "vit": [], "texts": []}

    def counted(name: str, function: Any) -> Any:
        def call(first: Any, *rest: Any, **named: Any) -> Any:
            seen[name].append(len(first))
            return function(first, *rest, **named)

        return call

    critic = method._critic()
    monkeypatch.setattr(critic, "images", counted("critic", critic.images))
    monkeypatch.setattr(critic, "_read", counted("texts", critic._read))
    monkeypatch.setattr(method.backbone, "forward", counted("vit", method.backbone.forward))
    for _ in range(3):
        total(method.losses(batch(), place(method, "refine"))).backward()
    assert seen["critic"] == [6, 6, 6]  # three pairs, masked in and out
    assert seen["vit"] == [2, 2, 2]
    assert seen["texts"] == [3, 3]  # classes and prompts, at the first step alone


def test_maps_that_train_are_the_score_maps_and_padding_has_none() -> None:
    method = small().eval()
    whole = batch()
    torch.testing.assert_close(method._maps(whole).detach(), method.score_maps(whole.images, Options()).scores)
    padded = method._masks(method._maps(batch(padding=32)), torch.tensor([[0, 0]]), 64, 0.1)
    assert padded[0, :, :24].max() > 0
    prepared = method._prepared(method._critic(), batch(padding=32))
    assert not prepared[..., 32:].any() and prepared[..., :32].any()


def test_attention_that_is_made_again_gives_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (fusion.KEPT_BYTES, 0):
        monkeypatch.setattr(fusion, "KEPT_BYTES", kept)
        method = small(reduction=1).eval()
        total(method.losses(batch(), place(method, "align"))).backward()
        found.append({name: p.grad for name, p in method.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=5e-3 * float(gradient.abs().max()), rtol=0, msg=name)


def test_the_same_draws_give_the_same_losses() -> None:
    for phase in LEARNS:
        found = []
        for _ in range(2):
            method = small().train()
            torch.manual_seed(5)
            found.append(method.losses(batch(), place(method, phase)))
        assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_the_critic_can_tell_what_it_was_taught() -> None:
    """With a ViT that can see: a red or blue square matches its class, and the ground without it the word for surroundings."""
    method = small(local_critic__views=4, local_critic__image_size=32).train()
    seeing = vit.create("scenes_vit", 32, drop_path=0.0)
    vit.load_initial(seeing, SCRATCH.with_name("scenes_vit.fp16.safetensors"))
    method._critic().net.get_submodule("visual.net").load_state_dict(seeing.net.state_dict())
    images, scores, tags = torch.full((8, 3, 32, 32), 0.5), torch.zeros(8, 3, 32, 32), torch.zeros(8, 3)
    for at in range(8):
        top, left, klass = 16 * (at % 2), 8 * (at // 4) + 4, at // 2 % 2
        images[at, 2 * klass, top : top + 16, left : left + 16] = 1.0
        scores[at, klass, top : top + 16, left : left + 16] = 1.0
        tags[at, klass] = 1
    critic, local = method._critic(), method.params.local_critic
    assert local is not None
    shown = local_critic.Shown(critic.prepared(images), torch.ones(8, 32, 32), scores, tags)
    said = [*method._said.of_classes(), method._said.of_phrases([local.background])]
    optimiser = torch.optim.AdamW(critic.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for _ in range(100):
        optimiser.zero_grad()
        local_critic.lesson(critic, local, shown, critic.means(said)).backward()
        optimiser.step()
    with torch.no_grad():
        texts, masks = critic.means(said), scores.amax(dim=1)
        inside, outside = (critic.images(shown.images * some[:, None]) @ texts.t() for some in (masks, 1 - masks))
    own, other = tags[:, :3].bool(), torch.cat([tags[:, [1, 0]], tags[:, 2:]], dim=1).bool()
    assert (inside[:, :3][own] > inside[:, :3][other] + 0.3).all()
    assert (inside[:, :3][own] > outside[:, :3][own] + 0.3).all()
    assert (outside[:, 3] > local_critic.MIDDLE).all() and outside[:, 3].mean() > inside[:, 3].mean()


def test_views_show_what_their_targets_say() -> None:
    params = small().params.local_critic
    assert params is not None
    scores = torch.zeros(2, 3, 32, 32)
    scores[0, 0, :16], scores[1, 1, :, 16:] = 1, 1
    tags = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    torch.manual_seed(0)
    images, valid = torch.ones(2, 3, 32, 32), torch.ones(2, 32, 32)
    shown, targets = local_critic.views(local_critic.Shown(images, valid, scores, tags), params)
    assert shown.shape == (2 * params.views, 3, 32, 32) and targets.shape == (2 * params.views, 4)
    assert targets.min() >= 0 and targets.max() <= 1 and not targets[:, 2].any()  # no image shows the third class
    bare = local_critic.views(local_critic.Shown(images, valid, 0 * scores, 0 * tags), params)[1]
    assert not bare[:, :3].any() and bare[:, 3].any()  # without a tag, all is surroundings
    none = local_critic.views(local_critic.Shown(images, 0 * valid, 0 * scores, 0 * tags), params)
    assert not none[0].any() and not none[1].any()  # padding is nothing at all


# what it starts from

WEAKTR = ("architecture", "image_size", "drop_path", "features", "token_weight", "attention", "patch_refine", "pool", "topk_share",
          "attention_pool", "reduction", "feature_reduction", "class_head", "patch_head")  # fmt: skip


def trained_weaktr(path: Path, names: Sequence[str] = LABELS.names, **changes: Any) -> weaktr.Method:
    """A model.safetensors as stage train writes it."""
    import json

    values = (
        {name: value for name, value in model_params().items() if name in WEAKTR} | changes | {"backbone_lr_factor": 0.1}
    )
    torch.manual_seed(7)
    made = weaktr.Method(LabelSpace(tuple(names)), config.parse(weaktr.Params, values, "model"), SCHEDULE, vit)
    with torch.no_grad():
        made.backbone.net.cls_token.normal_()
    section = json.dumps({"model": values})
    save_tensors(path, made.state_dict(), {"plugin": "weaktr", "labels": json.dumps(list(names)), "section": section})
    return made.eval()


def test_it_starts_as_weaktr_ended_and_shows_that_beside_what_became_of_it(tmp_path: Path) -> None:
    before = trained_weaktr(tmp_path / "model.safetensors")
    method = small().eval()
    method.load_initial(vit, tmp_path / "model.safetensors")
    images = batch().images
    wanted = before.score_maps(images, weaktr.Options())
    found = method.score_maps(images, Options())
    assert torch.equal(found.scores, wanted.scores) and torch.equal(found.tag_logits, wanted.tag_logits)
    with torch.no_grad():
        method.head.weight.normal_()
    inner = method.inspect(images)
    torch.testing.assert_close(inner["start"], wanted.scores)
    assert not torch.allclose(inner["fine"], wanted.scores)
    assert inner["match_inside"].shape == inner["match_outside"].shape == inner["match_prompt"].shape == (2, 3)


def test_the_local_critic_starts_with_the_columns_own_vit(tmp_path: Path) -> None:
    trained_weaktr(tmp_path / "model.safetensors")
    method = small()
    method.load_initial(vit, tmp_path / "model.safetensors")
    theirs, ours = method.backbone.net, method._critic().net.get_submodule("visual.net")
    assert torch.equal(ours.get_parameter("blocks.0.attn.qkv.weight"), theirs.blocks[0].attn.qkv.weight)
    assert torch.equal(ours.get_parameter("cls_token"), theirs.cls_token.mean(dim=1, keepdim=True))


def test_a_finished_model_goes_on_from_where_it_was(tmp_path: Path) -> None:
    method = small()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.normal_()
    save_tensors(tmp_path / "model.safetensors", method.state_dict(), {})
    again = small()
    again.load_initial(vit, tmp_path / "model.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in method.state_dict().items())


def test_what_holds_no_weaktr_or_another_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, vit.create("scenes_vit", 64, drop_path=0.0).net.state_dict(), {})
    with pytest.raises(ValueError, match=r"holds no WeakTr.*artifacts/weaktr/model\.safetensors.*params\.yaml"):
        small().load_initial(vit, path)
    trained_weaktr(path, token_weight="each")
    with pytest.raises(ValueError, match=r"was trained with token_weight 'each', not 'one': .*params\.yaml"):
        small().load_initial(vit, path)
    trained_weaktr(path, names=("disc", "star", "square"))
    with pytest.raises(ValueError, match=r"knows the classes disc, star, square; the data set has disc, square, star"):
        small().load_initial(vit, path)


def test_heads_of_their_own_make_the_fusion_learn_anew(tmp_path: Path) -> None:
    before = trained_weaktr(tmp_path / "model.safetensors")
    method = small(fusion_features="heads").eval()
    fresh = {name: value.clone() for name, value in method.adaptive_attention_fusion.state_dict().items()}
    method.load_initial(vit, tmp_path / "model.safetensors")
    assert all(torch.equal(value, fresh[name]) for name, value in method.adaptive_attention_fusion.state_dict().items())
    assert torch.equal(method.head.weight, before.head.weight)
    pooled = torch.arange(4.0 * 8).view(1, 4, 8)  # one image, four layers, two heads of four channels
    nets = [
        fusion.AttentionFusion(8, 2, 4, reduction=1, feature_reduction=1, pool="max", split=split)
        for split in ("interleaved", "heads")
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    reordered = pooled.view(1, 4, 2, 4).transpose(2, 3).reshape(1, 4, 8)  # head after head → channel by channel
    torch.testing.assert_close(nets[1](pooled), nets[0](reordered))
    assert not torch.allclose(nets[1](pooled), nets[0](pooled))


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
def test_the_authors_files_serve(classes: str, count: int, pool: str) -> None:
    state, prompts = official(classes)
    method = Method.from_official({"model": state, "epoch": 3, "miou": 0.7}, prompts)
    assert len(method.head.bias) == len(method.prompts) == count and method.cam.attention_pool == pool
    assert method.params.prompt.official_tokens
    used = [0, 1, -1] if classes == "VOC" else [0, 1, 89]  # ids 1, 2 and the last
    assert torch.equal(method.prompts[[0, 1, -1]], prompts["prompts"][used])
    images = torch.rand(1, 3, 224, 224)
    maps = method.score_maps(images, Options()).scores  # no critic is at hand, and none is needed
    assert maps.shape == (1, count, 14, 14)
    if classes == "VOC":
        torch.testing.assert_close(maps, weaktr.Method.from_official(state).score_maps(images, weaktr.Options()).scores)
    with pytest.raises(ValueError, match=r"prompts` of shape .*params\.yaml"):
        Method.from_official(state, {"prompts": torch.rand(3, 30, 512)})


def test_params_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for changes, told in {
        "one of critic and local_critic must be null": {"local_critic": None},
        r"templates \['a photo'\]": {"templates": ["a photo"]},
        "words are for source words": {"prompt__source": "words"},
        "file is for source file": {"prompt__source": "file"},
        "belong to a published critic": {"prompt__official_tokens": True},
    }.items():
        with pytest.raises(config.ParamsError, match=rf"(?s){changes}.*params\.yaml"):
            small(**told)
    with pytest.raises(ValueError, match=r"names has cat; the classes are disc, square, star"):
        small(names={"cat": ["kitten"]})
