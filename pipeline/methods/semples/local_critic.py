"""An image-text model that is trained on the data set's own images and tags, for use as the critic where no CLIP is at hand.

Network. Image tower: the run's ViT, started from the weights of the WeakTr to be refined (its class tokens averaged into
one), a learned softmax weighting of the patch tokens, and a linear projection. Text tower: open_clip's text transformer,
from random weights, over the tokens of the sentences in use alone. Both end in unit vectors of `width` channels.

Training. Contrastive matching of masked views with class texts: a batch gives `views` views per image and c + 1 texts, one
per class ("a photo of boat.") and one for the background ("a photo of background."). Each pair of view and text has a target
in 0..1 and a binary cross-entropy of its own, with logit sharpness · (cosine - 0.35), as in the sigmoid loss of SigLIP (Zhai
et al. 2023): a view may match several texts, or none. The threshold is 0.35, not 0, since a unit vector that matches n
orthogonal texts equally has a cosine of 1 / √n with each, and since SemPLeS' losses need cosines well above 0 for matches
and near 0 or below for the rest.

Views. SemPLeS shows its critic masked-in and masked-out images, so the critic is trained on such: the whole image (a quarter
of the views), a random region of it (half), or the image without all of its tagged classes, each removed by its score map
raised to a random power of 0.25 to 1, which widens the mask (a quarter). With probability `paste`, what is hidden shows
another image of the batch instead of the mean colour, which decorrelates classes and surroundings that occur together in the
data set.

Targets. Classes: the tags of the image where the view is the whole or a region, whatever the region shows, so that the
critic learns how much each part of an image says about its class, parts that WeakTr's score maps miss included; where the
classes were removed, the fraction of the class' evidence (squared score map) that is still visible. Background: the visible
fraction of what no score map covers. Of a pasted image likewise; the larger target holds. No mask is used: the score maps
are those of a network trained on tags alone. What always occurs with a class and is always covered by its score map cannot
be told from the class by this training.

Shape letters: b images, c classes, s px of the critic's side, d channels of a unit vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core.config import AboveZero, NonNegative, Positive, Share
from pipeline.methods.semples import masking
from pipeline.methods.semples.clip import Critic
from pipeline.methods.semples.sentences import Tokeniser
from pipeline.nn.torchvision_guard import define_missing_operators
from pipeline.nn.vit.class_tokens import ClassTokenVit

define_missing_operators()
from open_clip.transformer import TextTransformer  # noqa: E402

VIEW_KINDS = ("whole", "region", "region", "outside")  # drawn with equal probability
OUTSIDE = VIEW_KINDS.index("outside")
LOWEST_POWER = 0.25  # the random power that widens score maps lies between this and 1
EVIDENCE_POWER = 2.0
MATCH_THRESHOLD = 0.35  # the cosine at which the probability of a match is 0.5
LOWEST_PASTED_FRACTION = 0.02  # fraction of a view's pixels that a pasted image must fill for its tags to count


@dataclass(frozen=True)
class LocalCriticParams:
    """The network and the training views of train.model.local_critic.

    image_size  px of the square images that it takes, a multiple of the ViT's stride
    width, layers, heads   of the text tower; width is also that of the common space
    background  word of the text for what is no class: "a photo of <background>."
    views       of each image in a step
    paste       probability, 0..1, that the hidden part of a view shows another image instead of the mean colour
    cells       of the grid, along a side, that random regions are drawn on
    sharpness   logit of a match = sharpness · (cosine - 0.35)
    backbone_lr_factor   learning rate of the ViT over that of the rest
    """

    image_size: Positive
    width: Positive
    layers: Positive
    heads: Positive
    background: str
    views: Positive
    paste: Share
    cells: Positive
    sharpness: AboveZero
    backbone_lr_factor: NonNegative

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")


class ImageTower(nn.Module):
    """timm's ViT → weighted mean of its patch tokens → projection, much as open_clip builds towers of timm's models.

    The weights are a softmax of a learned linear function of the tokens: most of a masked image is hidden, and an unweighted
    mean would be dominated by its patches.
    """

    def __init__(self, vit: Any, width: int) -> None:
        """vit: what nn/vit/backbone.create returns; width: channels of the common space."""
        super().__init__()
        self.net, self.prefix = vit.net, int(vit.prefix)
        self.weigh = nn.Linear(vit.dim, 1)
        nn.init.zeros_(self.weigh.weight)  # starts as the mean
        self.proj = nn.Linear(vit.dim, width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,s,s], normalised → f32[b,width], not normalised."""
        patches = self.net.forward_features(images)[:, self.prefix :]
        return self.proj((self.weigh(patches).softmax(dim=1) * patches).sum(dim=1))


class TwoTowers(nn.Module):
    """Image and text tower under the names that open_clip's models have."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual, self.text = visual, text

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)


def create(params: LocalCriticParams, vit: Any, sentences: Sequence[str], prompt_length: int) -> Critic:
    """A critic with random weights. ValueError where image_size is no multiple of the ViT's stride.

    vit: what nn/vit/backbone.create returns, of the run's architecture; sentences: all that it will ever be given;
    prompt_length: vectors of a prompt, for which a sentence must have room besides.
    """
    if params.image_size % vit.stride:
        raise ValueError(
            f"local_critic.image_size {params.image_size} is no multiple of the ViT's stride {vit.stride} (edit the recipe)"
        )
    unbounded = Tokeniser(10**6, sentences)
    longest = max(len(unbounded.numbers(text)) for text in sentences) + prompt_length + 2
    tokeniser = Tokeniser(longest, sentences)
    config: dict[str, Any] = {
        "context_length": longest,
        "vocab_size": tokeniser.vocabulary_size,
        "width": params.width,
        "heads": params.heads,
        "layers": params.layers,
        "output_dim": params.width,
    }
    towers = TwoTowers(ImageTower(vit, params.width), TextTransformer(**config))
    return Critic(towers, tokeniser, vit.normalise, params.image_size)


def load_backbone(critic: Critic, backbone: ClassTokenVit) -> None:
    """Copies the weights of the run's ViT into the image tower, the mean of its class tokens as the tower's class token."""
    tower: Any = critic.net.get_submodule("visual")
    initial = tower.net.state_dict()  # the tower's final norm stays as it is where the run's ViT applies none
    tower.net.load_state_dict(initial | backbone.plain_weights(tower.net))


@dataclass(frozen=True)
class CriticBatch:
    """A training batch at the critic's resolution.

    images  f32[b,3,s,s] as critic.prepare gives them
    valid   f32[b,s,s], 0 on padding and 1 elsewhere
    scores  f32[b,c,s,s] in 0..1: score maps; 0 for classes that the image is not tagged with, and on padding
    tags    f32[b,c] 0 or 1
    """

    images: Tensor
    valid: Tensor
    scores: Tensor
    tags: Tensor


def matching_loss(critic: Critic, params: LocalCriticParams, batch: CriticBatch, texts: Tensor) -> Tensor:
    """Scalar: binary cross-entropy, mean over all pairs of a masked view and a text.

    texts: f32[c+1,d], unit vectors of the class texts, then of the text for the background.
    """
    images, targets = masked_views(batch, params)
    cosines = critic.embed_images(images) @ texts.t()
    return F.binary_cross_entropy_with_logits(params.sharpness * (cosines - MATCH_THRESHOLD), targets)


def masked_views(batch: CriticBatch, params: LocalCriticParams) -> tuple[Tensor, Tensor]:
    """Images f32[views*b,3,s,s], and targets f32[views*b,c+1] in 0..1: how well each matches the class texts, and last the
    text for the background. Draws from torch's global generator."""
    images = batch.images * batch.valid[:, None]
    background = batch.valid[:, None] - batch.scores.amax(dim=1, keepdim=True)
    evidence = torch.cat([batch.scores**EVIDENCE_POWER, background.clamp(min=0)], dim=1)
    views, targets = [], []
    for _ in range(params.views):
        kind = torch.randint(len(VIEW_KINDS), (len(images),), device=images.device)
        visibility = _visibility(batch.scores, kind, params.cells)
        hidden = 1 - visibility
        fraction = masking.visible_fraction(evidence, visibility)
        target = _targets(fraction, batch.tags, (kind != OUTSIDE).float())
        pasted = (torch.rand(len(images), device=images.device) < params.paste).float()
        pasted_target = _targets(
            masking.visible_fraction(torch.roll(evidence, 1, dims=0), hidden),
            torch.roll(batch.tags, 1, dims=0) * (hidden.mean(dim=(1, 2)) > LOWEST_PASTED_FRACTION)[:, None],
            torch.ones_like(pasted),
        )
        other = torch.roll(images, 1, dims=0) * hidden[:, None]
        views.append(images * visibility[:, None] + other * pasted[:, None, None, None])
        targets.append(torch.maximum(target, pasted_target * pasted[:, None]))
    return torch.cat(views), torch.cat(targets)


def _targets(fraction: Tensor, tags: Tensor, by_tags: Tensor) -> Tensor:
    """Visible fractions f32[b,c+1], tags f32[b,c], by_tags f32[b] 0 or 1 → f32[b,c+1]: of the classes the tags where by_tags
    is 1, their visible fraction where it is 0; of the background always its visible fraction."""
    classes = by_tags[:, None] * tags + (1 - by_tags[:, None]) * fraction[:, :-1]
    return torch.cat([classes, fraction[:, -1:]], dim=1)


def _visibility(scores: Tensor, kind: Tensor, cells: int) -> Tensor:
    """Score maps f32[b,c,s,s], view kinds i64[b] (positions in VIEW_KINDS) → f32[b,s,s] in 0..1, 0 where the image is
    hidden."""
    b, size = len(scores), (scores.shape[-2], scores.shape[-1])
    powers = LOWEST_POWER ** torch.rand(b, 1, 1, device=scores.device)
    region = masking.random_regions(b, size, cells, scores)
    by_kind = torch.stack([torch.ones_like(region), region, region, 1 - scores.amax(dim=1) ** powers])
    return by_kind[kind, torch.arange(b, device=scores.device)]


def tower_parameters(critic: Critic) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of the ViT, and all others."""
    tower: Any = critic.net.get_submodule("visual")
    backbone = list(tower.net.parameters())
    of_backbone = {id(p) for p in backbone}
    return backbone, [p for p in critic.parameters() if id(p) not in of_backbone]
