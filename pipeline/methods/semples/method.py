"""SemPLeS: a trained WeakTr, refined by matching masked images with class texts and with learned prompts in a critic's
space.

The critic is an image-text model (clip.py), or one that is trained here (local_critic.py); the network is
nn/vit/cam_network.py. docs/methods/semples.md says what is published and what is ours. Shape letters: b images, c classes, p
pairs of an image and a class that it is tagged with, k vectors of a prompt, w channels of a token embedding, s px of the
critic's side, d channels of the critic's space.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase, Surroundings
from pipeline.core.labels import LabelSpace
from pipeline.methods.semples import clip, local_critic
from pipeline.methods.semples import prompts as prompting
from pipeline.methods.semples.losses import contrastive_prompt, prompt_suppression, segment_label_matching
from pipeline.methods.semples.masking import masked, soft_masks
from pipeline.methods.semples.params import PUBLISHED_SCHEDULE, LocalCritic, Params, published_params
from pipeline.methods.semples.texts import TextEmbeddings
from pipeline.nn import weights
from pipeline.nn.vit import backbone as vit
from pipeline.nn.vit import cam_network as network
from pipeline.nn.vit.fusion import MapBuffer
from pipeline.training import checkpoint
from pipeline.training.optim import decayed
from pipeline.training.settings import Schedule

NETWORK = ("backbone.", "head.", "class_weight", "class_bias", network.FUSION)  # prefixes of WeakTr's state-dict names
REFINED = ("head.", network.FUSION)  # of them those that are refined: the ViT stays as it is
PAIRS_AT_ONCE = 32  # pairs whose masked images the critic embeds together in inspect and surroundings

HAS_AFFINITY = True


@dataclass(frozen=True)
class Options:
    """extract.options: SemPLeS has none."""


class Method(network.CamNetwork):
    """WeakTr's network, whose `score_maps` it keeps, a critic, and a prompt of each class.

    family                     pipeline.nn.vit.backbone
    start_head, start_fusion   the refined parts as they were in `init`, for the report
    local_critic               the critic where it is trained here, else None
    prompts                    f32[c,k,w]; absent where phrases are suppressed
    texts                      vectors of class texts and prompts
    """

    def __init__(self, labels: LabelSpace, params: Params, schedule: Schedule, family: Any) -> None:
        """ValueError where `names` has a class that the data set has not."""
        super().__init__(len(labels), params, family, split=params.fusion_features)
        self.params, self.schedule = params, schedule
        self._classes = labels.names
        self.texts = TextEmbeddings(params.sentences(labels), params.prompt)
        self.start_head, self.start_fusion = copy.deepcopy(self.head), copy.deepcopy(self.adaptive_attention_fusion)
        self.start_head.requires_grad_(False)
        self.start_fusion.requires_grad_(False)
        local = params.local_critic
        self.local_critic = None if local is None else self._new_local_critic(local, family)
        if params.prompt.source != "words":
            width = clip.text_width(params.critic.model) if params.critic else self.critic().token_embedding.embedding_dim
            self.prompts = nn.Parameter(prompting.initial_prompts(params.prompt, len(labels), width))
        self._current_phase = ""
        self._read_critic: tuple[torch.device, clip.Critic] | None = None  # in a tuple: no part of this module

    def _new_local_critic(self, local: LocalCritic, family: Any) -> clip.Critic:
        plain_vit = family.create(self.params.architecture, local.image_size, drop_path=0.0)
        sentences, prompt = self.texts.sentences, self.params.prompt
        groups = [*sentences.of_classes(), sentences.of_phrases([local.background, *prompt.words, prompt.around or ""])]
        return local_critic.create(local, plain_vit, [text for texts in groups for text in texts], prompt.length)

    def critic(self) -> clip.Critic:
        """The image-text model in use. A published one is no part of this module: its weights are neither trained, nor
        saved, nor counted."""
        if self.local_critic is not None:
            return self.local_critic
        assert self.params.critic is not None  # as Params has made sure
        device = self.head.weight.device
        if self._read_critic is None or self._read_critic[0] != device:  # checked and moved once, not several times a step
            critic = clip.read_critic(self.params.critic, self.params.critic_normalisation).to(device)
            self._read_critic = device, critic
        return self._read_critic[1]

    def load_initial(self, family: Any, init: Path) -> None:
        """WeakTr's model.safetensors or the authors' file, of WeakTr or of SemPLeS; or a model.safetensors of this method;
        or none, for tests. ValueError for anything else: there is nothing to refine in a plain ViT."""
        del family
        tokeniser, prompt = (
            self.critic().tokeniser,
            self.params.prompt,
        )  # what is wrong with the critic is an error before the work
        tokeniser([text for texts in self.texts.sentences.of_classes() for text in texts])
        tokeniser.with_prompt(self.params.templates[0], prompt.length, official=prompt.official_tokens)
        if init.suffix != weights.SCRATCH:
            if weights.load_whole(self, init, "start_head.weight"):
                return
            self._load_network(init)
        self._start_from_network()
        if prompt.file is not None:
            self.prompts.data.copy_(prompting.read_prompts(prompt.file, self.prompts.shape))

    def _start_from_network(self) -> None:
        """Makes the network's present weights the start of refinement and of the local critic."""
        self.start_head.load_state_dict(self.head.state_dict())
        self.start_fusion.load_state_dict(self.adaptive_attention_fusion.state_dict())
        if self.local_critic is not None:
            local_critic.load_backbone(self.local_critic, self.backbone)

    def _load_network(self, init: Path) -> None:
        """WeakTr's weights, in our names or in the authors'."""
        tensors = {} if init.suffix == weights.HUB else weights.read_weights(init)
        if network.NETWORK_KEY not in tensors:
            raise ValueError(
                f"{init} holds no WeakTr, which SemPLeS refines: set methods.<run>.init to "
                "artifacts/<run>/model.safetensors of a weaktr run, or to a checkpoint of the authors, in params.yaml"
            )
        our_names = any(name.startswith("backbone.") for name in tensors)
        if our_names and init.suffix == ".safetensors":
            network.check_alike(checkpoint.read_metadata(init), self.cam, self._classes, init)
        tensors = tensors if our_names else network.renamed(tensors)
        unchanged = self._tensors_beside_network()
        if self.params.fusion_features == "heads":  # the file's fusion was trained with other features
            tensors = {name: value for name, value in tensors.items() if not name.startswith(network.FUSION)}
            initial_fusion = self.adaptive_attention_fusion.state_dict()
            unchanged |= {f"{network.FUSION}{name}": value for name, value in initial_fusion.items()}
        weights.load_exactly(self, tensors | unchanged, str(init), spoken=str if our_names else network.published_name)

    def _tensors_beside_network(self) -> dict[str, Tensor]:
        """The part of the state dict that no WeakTr has."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(NETWORK)}

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Any], prompts: Mapping[str, Tensor] | None = None) -> Method:
        """The authors' checkpoint of stage (a) or (c), in a wrapper {"model": …} or not, and their btp.pth → a method with
        the published settings, whose score maps need no critic. As weaktr.Method.from_official otherwise."""
        tokens = weights.unwrapped(state_dict).get("cls_token")
        coco = tokens is not None and tokens.shape[1] == network.COCO_IDS
        network_values, tensors = network.published(state_dict, attention_pool="avg" if coco else "max")
        labels = LabelSpace(tuple(f"class {number}" for number in range(1, len(tensors["head.weight"]) + 1)))
        method = cls(labels, published_params(network_values, coco=coco), PUBLISHED_SCHEDULE, vit)
        tensors |= method._tensors_beside_network()
        weights.load_exactly(method, tensors, "this state dict", spoken=network.published_name)
        method._start_from_network()
        if prompts is not None:
            method.prompts.data.copy_(prompting.published_prompts(prompts, method.prompts.shape, "btp.pth"))
        return method.eval()

    def phases(self) -> list[Phase]:
        """critic, where it is a local one; align and prompt, where prompts are learned and used; refine, from WeakTr's
        weights anew."""
        local = self.params.local_critic
        phases = [] if local is None else [local.schedule.phase("critic")]
        if self.params.prompt.source == "learned" and self.params.suppression_weight > 0:
            phases += [self.schedule.phase("align"), self.params.prompt.schedule.phase("prompt")]
        keep_best = REFINED if self.params.select == "critic" else ()
        return [*phases, self.schedule.phase("refine", restart=REFINED, keep_best=keep_best)]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        if phase.name == "prompt":
            return [ParamGroup([self.prompts], 1.0, 1.0)]
        if phase.name == "critic":
            assert self.params.local_critic is not None  # else there is no such phase
            backbone, rest = local_critic.tower_parameters(self.critic())
            return decayed(rest, 1.0) + decayed(backbone, self.params.local_critic.backbone_lr_factor)
        return decayed(self._trained_parameters(phase.name), 1.0)

    def _trained_parameters(self, phase: str) -> list[nn.Parameter]:
        """All that has a gradient in a phase."""
        if phase == "critic":
            return list(self.critic().parameters())
        if phase == "prompt":
            return [self.prompts]
        return [*self.head.parameters(), *self.adaptive_attention_fusion.parameters()]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """Those of the phase (section 3; of `critic`: local_critic.py). Means are over the pairs of the sub-batch; a
        sub-batch without tags has none, and losses of 0."""
        phase = self.phases()[clock.phase].name
        self._enable_gradients(phase)
        return {"critic": self._critic_losses, "prompt": self._prompt_losses}.get(phase, self._mask_losses)(batch)

    def _enable_gradients(self, phase: str) -> None:
        """Of what is trained in the phase and of nothing else; stochastic depth only where masks are trained, as
        published."""
        if phase == self._current_phase:
            return
        self.requires_grad_(False)
        for parameter in self._trained_parameters(phase):
            parameter.requires_grad_(True)
        self.backbone.train(self.training and phase in ("align", "refine"))
        self._current_phase = phase

    def _critic_losses(self, batch: Batch) -> dict[str, Tensor]:
        critic, local, pairs = self.critic(), self.params.local_critic, _pairs(batch)
        assert local is not None  # else there is no such phase
        scores = batch.images.new_zeros(*batch.tags.shape, critic.side, critic.side)
        with torch.no_grad():
            scores[pairs[:, 0], pairs[:, 1]] = self._masks(
                self._fine_cams(batch), pairs, critic.side, self.params.masks.prompt_eps
            )
        valid = _valid_at(critic.side, batch)
        views = local_critic.CriticBatch(critic.prepare(batch.images), valid, scores * valid[:, None], batch.tags)
        texts = self.texts.with_background(critic, local.background)
        return {"critic": local_critic.matching_loss(critic, local, views, texts)}

    def _prompt_losses(self, batch: Batch) -> dict[str, Tensor]:
        critic, pairs, weight = self.critic(), _pairs(batch), self.params.text_weight
        texts = self.texts.of_classes(critic)[pairs[:, 1]]
        if not len(pairs):
            return contrastive_prompt(texts, texts, texts + self.prompts.sum() * 0, text_weight=weight)
        with torch.no_grad():
            masks = self._masks(self._fine_cams(batch), pairs, critic.side, self.params.masks.prompt_eps)
            outside = critic.embed_images(masked(_prepared(critic, batch), pairs[:, 0], 1 - masks))
        tagged = batch.tagged()[:, 1].unique(return_inverse=True)
        classes, position = (numbers.to(pairs.device, non_blocking=True) for numbers in tagged)
        prompts = self.texts.of_prompts(critic, self.prompts[classes])[position]
        return contrastive_prompt(outside, texts, prompts, text_weight=weight)

    def _mask_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of align and refine."""
        pairs, params = _pairs(batch), self.params
        inside, outside, texts = self._matched(batch, pairs)
        losses = segment_label_matching(inside, outside, texts, background_weight=params.background_weight)
        if self._current_phase == "refine" and params.suppression_weight > 0:
            suppressed = self._suppressed_texts()[pairs[:, 1]]
            losses |= prompt_suppression(inside, suppressed, weight=params.suppression_weight)
        return losses

    def _matched(self, batch: Batch, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors f32[p,d] of masked-in images, of masked-out ones, and of the class texts."""
        critic = self.critic()
        texts, maps = self.texts.of_classes(critic)[pairs[:, 1]], self._fine_cams(batch)
        if not len(pairs):
            empty = texts + maps.sum() * 0  # with gradient, as of any other batch
            return empty, empty, texts
        masks = self._masks(maps, pairs, critic.side, self.params.masks.eps)
        return *_embedded(critic, _prepared(critic, batch), pairs[:, 0], masks), texts

    def score(self, batch: Batch) -> Tensor:
        """f32[2]: the sum of s(v⁺,t) - s(v⁻,t) over all pairs of an image and a class that it is tagged with, and the number
        of pairs. s(v⁺,t) is the critic's cosine of the masked-in image and the class text, s(v⁻,t) that of the masked-out
        one and the text; neither is clamped. Masks are those of refine (masks.eps); prompts take no part."""
        inside, outside, texts = self._matched(batch, _pairs(batch))
        return torch.stack([((inside - outside) * texts).sum(), texts.new_tensor(len(texts))])

    def _fine_cams(self, batch: Batch) -> Tensor:
        """f32[b,c,gh,gw], with gradient to head and fusion; the ViT runs once, without."""
        grid = batch.images.shape[-2] // self.stride, batch.images.shape[-1] // self.stride
        valid = F.adaptive_max_pool2d(batch.valid[:, None].float(), grid)[:, 0]
        with torch.no_grad():
            # a buffer of its own: backward reads the attention maps again
            outputs = self._backbone_outputs(batch.images, MapBuffer())
        return self._fused_maps(outputs, self.head, self.adaptive_attention_fusion, valid)["fine"]

    def _masks(self, maps: Tensor, pairs: Tensor, side: int, eps: float) -> Tensor:
        """Score maps f32[b,c,gh,gw], pairs i64[p,2] of image and class → f32[p,side,side] in 0..1."""
        with network.full_precision(maps):
            scores = maps[pairs[:, 0], pairs[:, 1]].float()
            return soft_masks(scores, (side, side), eps=eps, contrast=self.params.masks.contrast)

    def _suppressed_texts(self) -> Tensor:
        """f32[c,d]: what is suppressed in each class' masks."""
        return self.texts.suppressed(self.critic(), None if self.params.prompt.words else self.prompts)

    @torch.no_grad()
    def inspect(self, images: Tensor) -> dict[str, Tensor]:
        """As WeakTr's, and start f32[b,c,gh,gw], the fine CAM before refinement; and the critic's cosines f32[b,c]:
        match_inside, of the masked-in image and the class text; match_outside, of the masked-out one and the class text;
        match_prompt, of the masked-out one and what is suppressed. Every class is masked, whether the image shows it or
        not."""
        outputs, critic = self._backbone_outputs(images, self._map_buffer), self.critic()
        inner = self._inner_maps(outputs) | {"start": self._fused_maps(outputs, self.start_head, self.start_fusion)["fine"]}
        pairs = torch.ones(inner["fine"].shape[:2], device=images.device).nonzero()
        prepared, texts, cosines = critic.prepare(images), self.texts.of_classes(critic), []
        for part in pairs.split(PAIRS_AT_ONCE):
            masks = self._masks(inner["fine"], part, critic.side, self.params.masks.prompt_eps)
            inside, outside = _embedded(critic, prepared, part[:, 0], masks)
            match = [(inside * texts[part[:, 1]]).sum(dim=1), (outside * texts[part[:, 1]]).sum(dim=1)]
            if self.params.suppression_weight > 0:
                match.append((outside * self._suppressed_texts()[part[:, 1]]).sum(dim=1))
            cosines.append(torch.stack(match))
        names = ("match_inside", "match_outside", "match_prompt")
        by_name = torch.cat(cosines, dim=1).view(-1, *inner["fine"].shape[:2])
        return inner | dict(zip(names, by_name, strict=False))

    @torch.no_grad()
    def surroundings(self, images: Tensor, pairs: Tensor) -> Surroundings:
        """The critic's cosine of each masked-out image with what is suppressed beside each class; the masks are those of
        `inspect`."""
        if not self.params.suppression_weight:
            description = "nothing, since suppression_weight is 0"
            return Surroundings(images.new_zeros(len(pairs), 0), images.new_ones(len(pairs), 1, 1), description)
        critic, maps = self.critic(), self.score_maps(images, Options()).scores
        prepared, match, outside = critic.prepare(images), [], []
        for part in pairs.split(PAIRS_AT_ONCE):
            outside.append(1 - self._masks(maps, part, critic.side, self.params.masks.prompt_eps))
            embedded = critic.embed_images(masked(prepared, part[:, 0], outside[-1]))
            match.append(embedded @ self._suppressed_texts().t())
        return Surroundings(torch.cat(match), torch.cat(outside), prompting.description(self.params.prompt))


def _pairs(batch: Batch) -> Tensor:
    """i64[p,2] of image and class, on the batch's device."""
    return batch.tagged().to(batch.tags.device, non_blocking=True)


def _embedded(critic: clip.Critic, prepared: Tensor, image_index: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Images f32[b,3,s,s], i64[p], masks f32[p,s,s] → unit vectors f32[p,d] of masked-in and of masked-out images; one
    pass."""
    both = masked(prepared, image_index.repeat(2), torch.cat([masks, 1 - masks]))
    inside, outside = critic.embed_images(both).chunk(2)
    return inside, outside


def _valid_at(side: int, batch: Batch) -> Tensor:
    """f32[b,side,side], 0 on padding."""
    return F.interpolate(batch.valid[:, None].float(), (side, side))[:, 0]


def _prepared(critic: clip.Critic, batch: Batch) -> Tensor:
    """As critic.prepare; padding is the mean colour, as what is masked."""
    return critic.prepare(batch.images) * _valid_at(critic.side, batch)[:, None]
