"""train.model of SemPLeS: its dataclasses, and the published settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.core.config import NonNegative
from pipeline.core.labels import LabelSpace
from pipeline.methods.semples import clip
from pipeline.methods.semples.local_critic import LocalCriticParams
from pipeline.methods.semples.masking import Contrast
from pipeline.methods.semples.prompts import PromptParams
from pipeline.methods.semples.sentences import PLACEHOLDER, Sentences
from pipeline.nn.vit import cam_network as network
from pipeline.nn.vit.fusion import HeadSplit
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class LocalCritic(LocalCriticParams):
    """train.model.local_critic: its network and training views, and the schedule of phase `critic`."""

    schedule: Schedule


@dataclass(frozen=True)
class Masks:
    """How score maps become masks.

    eps         added to the range that a map is divided by, in align and refine (published 0.1)
    prompt_eps  the same in phase prompt and where the method is inspected (published 0.0001)
    contrast    absolute: eps is in units of the scores (published); relative: of each map's own maximum
    """

    eps: NonNegative
    prompt_eps: NonNegative
    contrast: Contrast


@dataclass(frozen=True)
class Prompts(PromptParams):
    """train.model.prompt: what is suppressed, and the schedule of phase `prompt`."""

    schedule: Schedule


@dataclass(frozen=True)
class Params(network.CamParams):
    """train.model: the network's params, which must be those of the run in `init`, and

    fusion_features       interleaved (published), or heads: each head's own, and the fusion learns anew (nn/vit/fusion.py)
    critic                a published image-text model, or null: then local_critic is trained
    critic_normalisation  of the images that `critic` is shown: clip, its own statistics, or imagenet, as in the authors'
                          program
    local_critic          null, or the image-text model to train
    templates             sentences with {} for a class name; a class' vector is the mean over all, prompts stand in the
                          first
    names                 class → its names in sentences, where they are not its own: {person: [player]}
    masks                 how score maps become masks
    prompt                what is suppressed
    background_weight     of the loss that masked-out images do not match their class (published 2.4 on VOC, 0.75 on COCO)
    text_weight           of the loss that a prompt is unlike its class' text (published 0.02, 0.01)
    suppression_weight    of the loss that masked-in images do not match the prompt (published 0.05, 0.2); 0: no prompt is
                          learned
    select                weights that phase refine ends with: last, those of its last step, or critic, those after its epoch
                          of the highest `Method.score`. Neither looks at a mask (published: the epoch with the best masks)
    """

    fusion_features: HeadSplit
    critic: clip.CriticFile | None
    critic_normalisation: clip.Normalisation
    local_critic: LocalCritic | None
    templates: tuple[str, ...]
    names: dict[str, tuple[str, ...]]
    masks: Masks
    prompt: Prompts
    background_weight: NonNegative
    text_weight: NonNegative
    suppression_weight: NonNegative
    select: Literal["last", "critic"]

    def __post_init__(self) -> None:
        if (self.critic is None) == (self.local_critic is None):
            raise ValueError("one of critic and local_critic must be null, and the other not")
        if not self.templates or any(text.count(PLACEHOLDER) != 1 for text in self.templates):
            raise ValueError(
                f"templates {list(self.templates)}: needs at least one, each with one {PLACEHOLDER} for the class name"
            )
        if self.critic is None and (self.prompt.official_tokens or self.prompt.file is not None):
            raise ValueError("prompt.official_tokens and prompt.file belong to a published critic: name it in critic")

    def sentences(self, labels: LabelSpace) -> Sentences:
        """Of the data set's classes. ValueError where `names` has a class that the data set has not."""
        if unknown := sorted(set(self.names) - set(labels.names)):
            raise ValueError(
                f"names has {', '.join(unknown)}; the classes are {', '.join(labels.names)} "
                "(edit train.model.names in the recipe)"
            )
        return Sentences(self.templates, tuple(self.names.get(name, (name,)) for name in labels.names))


# Section 5, VOC: lr 5.12e-4 · 64 / 512 and 0.1 · 128 / 512
PUBLISHED_SCHEDULE = Schedule(
    epochs=60, min_steps=0, batch_size=64, shards=1, lr=6.4e-5, lr_floor=0.0, weight_decay=0.03, optimiser="adamw",
    schedule="cosine",
    warmup=0,
)  # fmt: skip
PUBLISHED_PROMPT = Prompts(
    "learned", 30, "uniform", None, (), None, True,
    Schedule(
        epochs=60, min_steps=0, batch_size=128, shards=1, lr=2.5e-2, lr_floor=0.0, weight_decay=0.03, optimiser="adamw",
        schedule="cosine", warmup=0,
    ),
)  # fmt: skip
PUBLISHED_CRITIC = clip.CriticFile("ViT-B-32-quickgelu", "not at hand", "0" * 64)


def published_params(network_values: Mapping[str, Any], *, coco: bool) -> Params:
    """The settings of the paper and of the authors' program on COCO or on VOC. network_values: of CamParams."""
    return Params(
        **network_values,
        fusion_features="interleaved",
        critic=PUBLISHED_CRITIC,
        critic_normalisation="imagenet",
        local_critic=None,
        templates=(f"a photo of {PLACEHOLDER}.",),
        names={},
        masks=Masks(eps=0.1, prompt_eps=1e-4, contrast="absolute"),
        prompt=PUBLISHED_PROMPT,
        background_weight=0.75 if coco else 2.4,
        text_weight=0.01 if coco else 0.02,
        suppression_weight=0.2 if coco else 0.05,
        select="last",
    )
