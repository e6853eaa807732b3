"""SemPLeS: a trained WeakTr is refined by a critic of images and texts, and by prompts that learned what surrounds each class.

docs/methods/semples.md says what is published and what is ours. The network is nn/vit/cam_network.py, the critic nn/vit/clip.py, and the
one that is trained here nn/vit/local_critic.py. Shape letters: b images, c classes, p pairs of an image and a class that it shows,
k prompt vectors, d channels of the critic's space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import NonNegative
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, Surroundings
from pipeline.core.labels import LabelSpace
from pipeline.methods.semples import clip, local_critic
from pipeline.methods.semples import prompts as prompting
from pipeline.methods.semples.masking import Contrast, masked, soft_masks
from pipeline.nn import weights
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import cam_network as network
from pipeline.nn.vit import fusion as fuse
from pipeline.training import checkpoint
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule


@dataclass(frozen=True)
class LocalCritic(local_critic.LocalParams):
    """train.<m>.model.local_critic: its network and lessons, and the schedule of phase `critic`."""

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
class Prompts(prompting.PromptParams):
    """train.<m>.model.prompt: what is suppressed, and the schedule of phase `prompt`."""

    schedule: Schedule


@dataclass(frozen=True)
class Params(network.CamParams):
    """train.<m>.model: the network's params, which must be those of the column in `init`, and

    fusion_features      interleaved (published), or heads: each head's own, and the fusion learns anew (nn/vit/fusion.py)
    critic               a published image-text model, or null: then local_critic is trained
    critic_normalisation clip: what the critic was trained with; imagenet: what the authors showed theirs; for `critic` alone
    local_critic         null, or what to train
    templates            sentences with {} for a class name; a class' vector is the mean over all, prompts stand in the first
    names                class → its names in sentences, where they are not its own: {person: [player]}
    masks, prompt        see there
    background_weight    of the class in what was masked out (published 2.4 on VOC, 0.75 on COCO)
    text_weight          of a prompt's likeness to its class' own text, which it is to lack (0.02, 0.01)
    suppression_weight   of the prompt in what was masked in (0.05, 0.2); 0: no prompt is learned
    select               last: phase refine ends with its last step's weights | critic: with those after its epoch of the highest
                         `Method.score`. Neither looks at a mask (published: the epoch with the best masks)
    """

    fusion_features: fuse.Split
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
        if not self.templates or any(text.count(clip.PLACE) != 1 for text in self.templates):
            raise ValueError(
                f"templates {list(self.templates)}: needs at least one, each with one {clip.PLACE} for the class name"
            )
        if self.critic is None and (self.prompt.official_tokens or self.prompt.file is not None):
            raise ValueError("prompt.official_tokens and prompt.file belong to a published critic: name it in critic")


@dataclass(frozen=True)
class Options:
    """extract.<m>.options: SemPLeS has none."""


# Section 5, VOC: lr 5.12e-4 · 64 / 512 and 0.1 · 128 / 512
PUBLISHED_SCHEDULE = Schedule(
    epochs=60, batch_size=64, shards=1, lr=6.4e-5, lr_floor=0.0, weight_decay=0.03, optimiser="adamw", schedule="cosine", warmup=0,
)  # fmt: skip
PUBLISHED_PROMPT = Prompts(
    "learned", 30, "uniform", None, (), None, True,
    Schedule(
        epochs=60, batch_size=128, shards=1, lr=2.5e-2, lr_floor=0.0, weight_decay=0.03, optimiser="adamw", schedule="cosine", warmup=0,
    ),
)  # fmt: skip
PUBLISHED_CRITIC = clip.CriticFile("ViT-B-32-quickgelu", "not at hand", "0" * 64)
NETWORK = ("backbone.", "head.", "class_weight", "class_bias", network.FUSION)
LEARNING = ("head.", network.FUSION)  # of the network: the ViT stays as it is
LOWEST, HIGHEST = 1e-4, 0.9999
AT_ONCE = 32  # images that the critic looks at together where it is inspected


def segment_label_matching(inside: Tensor, outside: Tensor, texts: Tensor, *, background_weight: float) -> dict[str, Tensor]:
    """Section 3 (a): what is masked in matches its class, what is masked out does not. Unit vectors f32[p,d] of the two images and of
    the class of each pair → two weighted scalars, 0 where there is no pair."""
    return {
        "matching": _mean(-_cosine(inside, texts).log()),
        "background": background_weight * _mean(-(1 - _cosine(outside, texts)).log()),
    }


def contrastive_prompt(outside: Tensor, texts: Tensor, prompts: Tensor, *, text_weight: float) -> dict[str, Tensor]:
    """Section 3 (b): a prompt matches what is masked out, and is unlike its class' text. Unit vectors f32[p,d]."""
    return {
        "attraction": _mean(-_cosine(outside, prompts).log()),
        "repulsion": text_weight * _mean(_cosine(texts, prompts).log()),
    }


def prompt_suppression(inside: Tensor, prompts: Tensor, *, weight: float) -> dict[str, Tensor]:
    """Section 3 (c), beside segment_label_matching: what is masked in does not match the prompt. Unit vectors f32[p,d]."""
    return {"suppression": weight * _mean(-(1 - _cosine(inside, prompts)).log())}


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=1).clamp(LOWEST, HIGHEST)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))


class Method(network.CamNetwork):
    """family: pipeline.nn.vit.backbone. `score_maps` is the network's.

    start_head, start_fusion   the parts of the network that learn, as they were in `init`: what the report shows as before
    """

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        """ValueError where `names` has a class that the data set has not."""
        super().__init__(len(labels), params, family, split=params.fusion_features)
        self.params, self.schedule = params, schedule
        if strangers := sorted(set(params.names) - set(labels.names)):
            raise ValueError(
                f"names has {', '.join(strangers)}; the classes are {', '.join(labels.names)} (edit train.<m>.model.names)"
            )
        self._classes = labels.names
        self._said = clip.Sentences(params.templates, tuple(params.names.get(name, (name,)) for name in labels.names))
        self.start_head, self.start_fusion = copy.deepcopy(self.head), copy.deepcopy(self.adaptive_attention_fusion)
        self.start_head.requires_grad_(False)
        self.start_fusion.requires_grad_(False)
        local = params.local_critic
        self.local_critic = None if local is None else self._local(local, family)
        if params.prompt.source != "words":
            width = clip.text_width(params.critic.model) if params.critic else self._critic().embedding.embedding_dim
            self.prompts = nn.Parameter(prompting.drawn(params.prompt, len(labels), width))
        self._texts, self._unwanted = clip.Remembered(), clip.Remembered()
        self._entered = ""

    def _local(self, local: LocalCritic, family: Any) -> clip.Critic:
        plain = family.create(self.params.architecture, local.image_size, drop_path=0.0)
        said, prompt = self._said, self.params.prompt
        groups = [*said.of_classes(), said.of_phrases([local.background, *prompt.words, prompt.around or ""])]
        return local_critic.create(local, plain, [text for texts in groups for text in texts], prompt.length)

    def load_initial(self, family: Any, init: Path) -> None:
        """WeakTr's model.safetensors or the authors' file, of WeakTr or of SemPLeS; or a model.safetensors of this method; or none, for
        tests. ValueError for anything else: there is nothing to refine in a plain ViT."""
        del family
        tokens, prompt = self._critic().tokens, self.params.prompt  # what is wrong with the critic is told before the work
        tokens([text for texts in self._said.of_classes() for text in texts])
        tokens.prompted(self.params.templates[0], prompt.length, official=prompt.official_tokens)
        if init.suffix != weights.SCRATCH:
            if weights.load_whole(self, init, "start_head.weight"):
                return
            self._load_network(init)
        self._begin()
        if prompt.file is not None:
            self.prompts.data.copy_(prompting.read(prompt.file, self.prompts.shape))

    def _begin(self) -> None:
        """The network as it now is, is where refinement and local critic start."""
        self.start_head.load_state_dict(self.head.state_dict())
        self.start_fusion.load_state_dict(self.adaptive_attention_fusion.state_dict())
        if self.local_critic is not None:
            local_critic.start_from(self.local_critic, self.backbone)

    def _load_network(self, init: Path) -> None:
        tensors = {} if init.suffix == weights.HUB else weights.read_weights(init)
        if network.MARK not in tensors:
            raise ValueError(
                f"{init} holds no WeakTr, which SemPLeS refines: set methods.<m>.init to artifacts/weaktr/model.safetensors, or to a "
                "checkpoint of the authors, in params.yaml"
            )
        own = any(name.startswith("backbone.") for name in tensors)
        if own and init.suffix == ".safetensors":
            network.check_alike(checkpoint.read_metadata(init), self.cam, self._classes, init)
        given = tensors if own else network.renamed(tensors)
        rest = {name: value for name, value in self.state_dict().items() if not name.startswith(NETWORK)}
        if self.params.fusion_features == "heads":  # the file's fusion has learned to read other features
            given = {name: value for name, value in given.items() if not name.startswith(network.FUSION)}
            rest |= {f"{network.FUSION}{name}": value for name, value in self.adaptive_attention_fusion.state_dict().items()}
        weights.load_exactly(self, given | rest, str(init), spoken=str if own else network.published_name)

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], prompts: Mapping[str, Tensor] | None = None) -> Method:
        """The authors' checkpoint of stage (a) or (c), in a wrapper {"model": …} or not, and their btp.pth → a method with the published
        settings, whose score maps need no critic. As weaktr.Method.from_official otherwise."""
        tokens = weights.unwrapped(state_dict).get("cls_token")
        coco = tokens is not None and tokens.shape[1] == network.COCO_IDS
        values, given = network.published(state_dict, attention_pool="avg" if coco else "max")
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(given["head.weight"]) + 1)))
        params = Params(
            **values,
            fusion_features="interleaved",
            critic=PUBLISHED_CRITIC,
            critic_normalisation="imagenet",
            local_critic=None,
            templates=(f"a photo of {clip.PLACE}.",),
            names={},
            masks=Masks(eps=0.1, prompt_eps=1e-4, contrast="absolute"),
            prompt=PUBLISHED_PROMPT,
            background_weight=0.75 if coco else 2.4,
            text_weight=0.01 if coco else 0.02,
            suppression_weight=0.2 if coco else 0.05,
            select="last",
        )
        made = cls(labels, params, PUBLISHED_SCHEDULE, vit)
        rest = {name: value for name, value in made.state_dict().items() if not name.startswith(NETWORK)}
        weights.load_exactly(made, given | rest, "this state dict", spoken=network.published_name)
        made._begin()
        if prompts is not None:
            made.prompts.data.copy_(prompting.fitting(prompts, made.prompts.shape, "btp.pth"))
        return made.eval()

    def phases(self) -> list[Phase]:
        """critic, where it is a local one; align and prompt, where prompts are learned and used; refine, from WeakTr's weights anew."""
        found = [] if self.params.local_critic is None else [self.params.local_critic.schedule.phase("critic")]
        if self.params.prompt.source == "learned" and self.params.suppression_weight > 0:
            found += [self.schedule.phase("align"), self.params.prompt.schedule.phase("prompt")]
        best = LEARNING if self.params.select == "critic" else ()
        return [*found, self.schedule.phase("refine", restart=LEARNING, keep_best=best)]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        if phase.name == "prompt":
            return [ParamGroup([self.prompts], 1.0, 1.0)]
        if phase.name == "critic":
            assert self.params.local_critic is not None
            vit_, rest = local_critic.tower_parameters(self._critic())
            return decayed(rest, 1.0) + decayed(vit_, self.params.local_critic.backbone_lr_factor)
        return decayed(self._learning(phase.name), 1.0)

    def _learning(self, phase: str) -> list[nn.Parameter]:
        """All that has a gradient in a phase."""
        if phase == "critic":
            return list(self._critic().parameters())
        if phase == "prompt":
            return [self.prompts]
        return [*self.head.parameters(), *self.adaptive_attention_fusion.parameters()]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Those of the phase (section 3; of `critic`, nn/vit/local_critic.py). Means are over the pairs of the sub-batch; one without
        any, since nothing in it is tagged, has losses of 0."""
        phase = self.phases()[clock.phase].name
        self._enter(phase)
        return {"critic": self._critic_losses, "prompt": self._prompt_losses}.get(phase, self._mask_losses)(batch)

    def _enter(self, phase: str) -> None:
        """Gradient for what learns in the phase and for nothing else; stochastic depth only where masks learn, as published."""
        if phase == self._entered:
            return
        self.requires_grad_(False)
        for parameter in self._learning(phase):
            parameter.requires_grad_(True)
        self.backbone.train(self.training and phase in ("align", "refine"))
        self._entered = phase

    def _critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        critic, local, pairs = self._critic(), self.params.local_critic, torch.nonzero(batch.tags)
        assert local is not None  # else there is no such phase
        scores = batch.images.new_zeros(*batch.tags.shape, critic.side, critic.side)
        with torch.no_grad():
            scores[pairs[:, 0], pairs[:, 1]] = self._masks(
                self._maps(batch), pairs, critic.side, self.params.masks.prompt_eps
            )
        valid = self._valid(critic, batch)
        shown = local_critic.Shown(critic.prepared(batch.images), valid, scores * valid[:, None], batch.tags)
        texts = critic.means([*self._said.of_classes(), self._said.of_phrases([local.background])])
        return {"critic": local_critic.lesson(critic, local, shown, texts)}

    def _prompt_losses(self, batch: Batch) -> dict[str, Tensor]:
        critic, pairs, weight = self._critic(), torch.nonzero(batch.tags), self.params.text_weight
        texts = self._class_vectors()[pairs[:, 1]]
        if not len(pairs):
            return contrastive_prompt(texts, texts, texts + self.prompts.sum() * 0, text_weight=weight)
        with torch.no_grad():
            masks = self._masks(self._maps(batch), pairs, critic.side, self.params.masks.prompt_eps)
            outside = critic.images(masked(self._prepared(critic, batch), pairs[:, 0], 1 - masks))
        classes, place = pairs[:, 1].unique(return_inverse=True)
        return contrastive_prompt(outside, texts, self._prompt_vectors(self.prompts[classes])[place], text_weight=weight)

    def _mask_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of align and refine."""
        pairs, params = torch.nonzero(batch.tags), self.params
        inside, outside, texts = self._matched(batch, pairs)
        found = segment_label_matching(inside, outside, texts, background_weight=params.background_weight)
        if self._entered == "refine" and params.suppression_weight > 0:
            found |= prompt_suppression(inside, self._unwanted_vectors()[pairs[:, 1]], weight=params.suppression_weight)
        return found

    def _matched(self, batch: Batch, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors f32[p,d] of masked-in images, of masked-out ones, and of the classes' texts. The critic looks at all images in
        one pass."""
        critic, texts, maps = self._critic(), self._class_vectors()[pairs[:, 1]], self._maps(batch)
        if not len(pairs):
            none = texts + maps.sum() * 0
            return none, none, texts
        masks = self._masks(maps, pairs, critic.side, self.params.masks.eps)
        both = masked(self._prepared(critic, batch), pairs[:, 0].repeat(2), torch.cat([masks, 1 - masks]))
        inside, outside = critic.images(both).chunk(2)
        return inside, outside, texts

    def score(self, batch: Batch) -> Tensor:
        """f32[2]: the sum of s(v⁺,t) - s(v⁻,t) over all pairs of an image and a class that it is tagged with, and the number of pairs.
        s(v⁺,t) is the critic's cosine of the masked-in image and the class' text, s(v⁻,t) that of the masked-out one and the text;
        neither is clamped. Masks are those of refine (masks.eps); prompts take no part."""
        inside, outside, texts = self._matched(batch, torch.nonzero(batch.tags))
        return torch.stack([((inside - outside) * texts).sum(), texts.new_tensor(len(texts))])

    def _maps(self, batch: Batch) -> Tensor:
        """Fine CAM f32[b,c,gh,gw], with gradient to head and fusion; the ViT runs once, without."""
        grid = batch.images.shape[-2] // self.stride, batch.images.shape[-1] // self.stride
        seen = F.adaptive_max_pool2d(batch.valid[:, None].float(), grid)[:, 0]
        with torch.no_grad():
            looked = self._look(batch.images, fuse.Room())  # room of its own: the gradient reads the maps again
        return self._fuse(looked, self.head, self.adaptive_attention_fusion, seen)["fine"]

    def _masks(self, maps: Tensor, pairs: Tensor, side: int, eps: float) -> Tensor:
        """Maps f32[b,c,gh,gw], pairs i64[p,2] → f32[p,side,side] in 0..1."""
        with network.full_precision(maps):
            scores = maps[pairs[:, 0], pairs[:, 1]].float()
            return soft_masks(scores, (side, side), eps=eps, contrast=self.params.masks.contrast)

    @staticmethod
    def _valid(critic: clip.Critic, batch: Batch) -> Tensor:
        """f32[b,side,side], 0 on padding."""
        return F.interpolate(batch.valid[:, None].float(), (critic.side, critic.side))[:, 0]

    def _prepared(self, critic: clip.Critic, batch: Batch) -> Tensor:
        """As critic.prepared; padding is the mean colour, which is what masks leave, too."""
        return critic.prepared(batch.images) * self._valid(critic, batch)[:, None]

    def _critic(self) -> clip.Critic:
        """A published critic is no part of this module: its weights are neither trained, nor saved, nor counted."""
        if self.local_critic is not None:
            return self.local_critic
        assert self.params.critic is not None  # as Params has made sure
        return clip.read_critic(self.params.critic, self.params.critic_normalisation).to(self.head.weight.device)

    def _class_vectors(self) -> Tensor:
        return self._texts(self._critic().parameters(), lambda: self._critic().means(self._said.of_classes()))

    def _prompt_vectors(self, given: Tensor) -> Tensor:
        """Vectors f32[·,k,w] of prompts → f32[·,d]."""
        return prompting.vectors(self._critic(), self.params.prompt, self.params.templates[0], given)

    def _unwanted_vectors(self) -> Tensor:
        """f32[c,d]: what is suppressed beside each class."""
        words = self.params.prompt.words
        if not words:
            return self._unwanted([*self._critic().parameters(), self.prompts], lambda: self._prompt_vectors(self.prompts))
        phrases, classes = [self._said.of_phrases(words)], len(self._classes)
        return self._unwanted(self._critic().parameters(), lambda: self._critic().means(phrases).expand(classes, -1))

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """As WeakTr's, and start f32[b,c,gh,gw], the fine CAM before refinement. How well what the critic sees matches, f32[b,c] of
        cosines: match_inside, the masked-in image and its class; match_outside, the masked-out one and the class; match_prompt, the
        masked-out one and what is suppressed. Every class is masked, whether the image shows it or not."""
        looked, critic = self._look(images, self._room), self._critic()
        found = self._inner(looked) | {"start": self._fuse(looked, self.start_head, self.start_fusion)["fine"]}
        pairs = torch.ones(found["fine"].shape[:2], device=images.device).nonzero()
        prepared, texts, parts = critic.prepared(images), self._class_vectors(), []
        for some in pairs.split(AT_ONCE):
            masks = self._masks(found["fine"], some, critic.side, self.params.masks.prompt_eps)
            both = critic.images(masked(prepared, some[:, 0].repeat(2), torch.cat([masks, 1 - masks])))
            inside, outside = both.chunk(2)
            match = [(inside * texts[some[:, 1]]).sum(dim=1), (outside * texts[some[:, 1]]).sum(dim=1)]
            if self.params.suppression_weight > 0:
                match.append((outside * self._unwanted_vectors()[some[:, 1]]).sum(dim=1))
            parts.append(torch.stack(match))
        names = ("match_inside", "match_outside", "match_prompt")
        values = torch.cat(parts, dim=1).view(-1, *found["fine"].shape[:2])
        return found | dict(zip(names, values, strict=False))

    @torch.no_grad()
    def surroundings(self, images: Tensor, pairs: Tensor) -> Surroundings:
        """The critic's cosine of each masked-out image with what is suppressed beside each class; the masks are those of `inspect`."""
        if not self.params.suppression_weight:
            told = "nothing, since suppression_weight is 0"
            return Surroundings(images.new_zeros(len(pairs), 0), images.new_ones(len(pairs), 1, 1), told)
        critic, maps = self._critic(), self.score_maps(images, Options()).scores
        prepared, match, outside = critic.prepared(images), [], []
        for some in pairs.split(AT_ONCE):
            outside.append(1 - self._masks(maps, some, critic.side, self.params.masks.prompt_eps))
            match.append(critic.images(masked(prepared, some[:, 0], outside[-1])) @ self._unwanted_vectors().t())
        return Surroundings(torch.cat(match), torch.cat(outside), prompting.told(self.params.prompt))
