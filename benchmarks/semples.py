"""One step of SemPLeS' phase refine against its plain form. Each variant runs in a process of its own.

`python -m benchmarks.semples VARIANT` prints seconds and MiB as JSON; benchmarks/run.py sets pairs of variants side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Memory, Timing, main_of, pair
from pipeline.core import plugins
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.methods.semples import clip
from pipeline.methods.semples import method as semples
from pipeline.methods.semples.losses import prompt_suppression, segment_label_matching
from pipeline.methods.semples.masking import soft_masks
from pipeline.methods.semples.params import PUBLISHED_PROMPT, Masks
from pipeline.training.settings import Schedule

NAME = "benchmarks.semples"
CRITIC = "ViT-B-32"  # the paper's
CLASSES, BATCH, SIZE = 20, 4, 224
TAGS = 2  # of each image: eight pairs a step


@lru_cache(maxsize=1)
def random_critic() -> clip.Critic:
    torch.manual_seed(0)
    return clip.frozen_critic(clip.open_clip.create_model(CRITIC, pretrained_text=False), "clip")


class RandomCritic(semples.Method):
    """What stage train runs, with a critic of random weights, so that no file is needed."""

    def critic(self) -> clip.Critic:
        return random_critic()


class Plain(RandomCritic):
    """The reference: the critic's weights have gradients, the masked-in image is embedded twice and the masked-out one once
    more, texts and prompts are embedded at every step, and masks are applied one by one."""

    def _mask_losses(self, batch: Batch) -> dict[str, Tensor]:
        critic, params, pairs = self.critic().requires_grad_(True), self.params, torch.nonzero(batch.tags).tolist()
        for parameter in critic.parameters():
            parameter.grad = None
        maps, images = self._fine_cams(batch), critic.prepare(batch.images)
        insides, outsides = [], []
        for index, label in pairs:
            size = (critic.side, critic.side)
            mask = soft_masks(maps[index, label][None], size, eps=params.masks.eps, contrast=params.masks.contrast)
            insides.append(images[index] * mask)
            outsides.append(images[index] * (1 - mask))
        texts = critic.mean_texts([self.texts.sentences.of_classes()[label] for _, label in pairs])
        prompts = self.texts.of_prompts(critic, self.prompts)[[label for _, label in pairs]]
        embedded = [critic.embed_images(torch.stack(masked)) for masked in (insides, outsides, insides)]
        losses = segment_label_matching(embedded[0], embedded[1], texts, background_weight=params.background_weight)
        return losses | prompt_suppression(embedded[2], prompts, weight=params.suppression_weight)


def method(kind: type[RandomCritic]) -> RandomCritic:
    """On DeiT-Tiny with random weights and the paper's settings."""
    labels = LabelSpace(tuple(f"class {number}" for number in range(CLASSES)))
    params = semples.Params(
        architecture="deit_tiny_patch16_224", image_size=SIZE, drop_path=0.0, features="residual", token_weight="each",
        attention="fused", patch_refine=True, pool="gap", topk_share=1.0, attention_pool="max", reduction=8,
        feature_reduction=8, class_head="mean", patch_head="conv3", fusion_features="interleaved",
        critic=clip.CriticFile(CRITIC, "", "0" * 64), critic_normalisation="clip", local_critic=None,
        templates=("a photo of {}.",), names={}, masks=Masks(0.1, 1e-4, "absolute"), prompt=PUBLISHED_PROMPT,
        background_weight=2.4, text_weight=0.02, suppression_weight=0.05, select="last",
    )  # fmt: skip
    torch.manual_seed(0)
    schedule = Schedule(1, 0, BATCH, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    return kind(labels, params, schedule, plugins.load("nn", "vit"))


def step_of(kind: type[RandomCritic]) -> Callable[[], dict[str, Any]]:
    """Forward and backward of one batch."""
    trained = method(kind).train()
    torch.manual_seed(1)
    tags = F.one_hot(torch.arange(BATCH), CLASSES) + F.one_hot(torch.arange(BATCH) + TAGS * BATCH, CLASSES)
    batch = Batch(torch.rand(BATCH, 3, SIZE, SIZE), tags.float(), torch.ones(BATCH, SIZE, SIZE, dtype=torch.bool), None)
    refine = len(trained.phases()) - 1

    def step() -> dict[str, Any]:
        for parameter in trained.parameters():
            parameter.grad = None
        losses = trained.losses(batch, Clock(refine, 0, 1))
        torch.stack(list(losses.values())).sum().backward()
        return {name: value.detach() for name, value in losses.items()} | {"head": trained.head.weight.grad}

    return step


VARIANTS: dict[str, Callable[[], Callable[[], object]]] = {
    "refine-pipeline": lambda: step_of(RandomCritic),
    "refine-plain": lambda: step_of(Plain),
}


def refinement(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    torch.set_num_threads(1)
    pipeline, plain = step_of(RandomCritic)(), step_of(Plain)()
    random_critic().requires_grad_(False)
    for name, value in pipeline.items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-3, msg=name)
    return pair(
        NAME, "refine-pipeline", "refine-plain", "SemPLeS refine step, ViT-B/32 as critic", BATCH, "images", "plain form"
    )


if __name__ == "__main__":
    main_of(VARIANTS)()
