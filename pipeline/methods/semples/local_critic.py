"""A critic for places without CLIP: the column's own ViT and a small text tower, trained on the data set's images and tags.

Tags say what is in an image, not where. SemPLeS, however, shows its critic images of which only a part is left, and asks three things:
whether that part shows the class, whether the rest shows nothing of it, and whether the part shows surroundings too. So the critic must
know masked images, and have a notion of surroundings. Both are taken from the tags and from the score maps of the network that is to be
refined (WeakTr, itself trained on tags alone):

* Views. Each image is shown as a whole, through a random region, or with all its classes taken out by their score maps, which are widened
  by a random power. What is hidden is the mean colour, as SemPLeS hides it, or another image of the batch: a sea with a meadow pasted
  into it breaks up a co-occurrence that no tag does.
* Sentences. "a photo of boat." for what is there, and "a photo of background." for all else, which an untagged image is full of.
* Targets. Any number of sentences match a view. A whole image or a region is said to show all tags of its image, wherever they lie, so
  that the critic learns how much what it sees gives a class away: a sail that WeakTr misses does, as much as the hull that it finds,
  and the sea does a little. Where the classes were taken out, score maps say how much of each is left; and everywhere how much of what
  is none of them. Each pair of view and sentence is judged by itself (the sigmoid loss of SigLIP, Zhai et al. 2023), so that an image
  may match several, or nothing. The middle lies at a cosine of 0.35, since a unit vector that matches n unrelated ones has a cosine of
  1 / √n with each: SemPLeS' losses take the cosine as it is, and want matches high above 0 and the rest near it or below.

The image tower starts as the very ViT that the column starts with, its class tokens made one: a few hundred images do not teach a ViT to
see, and after WeakTr it knows the classes already. The text tower is open_clip's, over the few tokens that the sentences use.
What always comes with a class and is always taken for it by WeakTr, the critic cannot tell from it: only what varies averages out.

Shape letters: b images, c classes, s px of the critic's side, v views, d channels.
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
from pipeline.methods.semples.clip import Critic, Tokens
from pipeline.nn.torchvision_guard import define_missing_operators
from pipeline.nn.vit.class_tokens import ClassTokenVit

define_missing_operators()
from open_clip.transformer import TextTransformer  # noqa: E402

KINDS = ("whole", "region", "region", "outside")
OUTSIDE = KINDS.index("outside")
WIDEST = 0.25  # score maps are raised to a power between this and 1: what is faint then counts more
EVIDENCE_POWER = 2.0
MIDDLE = 0.35  # the cosine at which a match is as likely as not
GLIMPSE = 0.02  # share of a view that must be of a pasted image for its tags to count


@dataclass(frozen=True)
class LocalParams:
    """The network and the lessons of train.<m>.model.local_critic.

    image_size  px of the square images that it sees
    width, layers, heads   of the text tower; width is also that of the common space
    background  the word for surroundings: "a photo of <background>."
    views       of each image at a step
    paste       share of the views whose hidden part shows another image instead of the mean colour
    cells       of the grid that random regions are drawn on
    sharpness   of the sigmoid that turns a cosine into a match
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
    """timm's ViT → a weighted mean of its patches → the common space, much as open_clip builds towers of timm's models.

    The weights are learned, and equal at first: most of a masked image is hidden, and its patches should not drown what is shown.
    """

    def __init__(self, vit: Any, width: int) -> None:
        """vit: what nn/vit/backbone.create returns."""
        super().__init__()
        self.net, self.prefix = vit.net, int(vit.prefix)
        self.weigh = nn.Linear(vit.dim, 1)
        nn.init.zeros_(self.weigh.weight)  # starts as the mean
        self.proj = nn.Linear(vit.dim, width, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.net.forward_features(images)[:, self.prefix :]
        return self.proj((self.weigh(patches).softmax(dim=1) * patches).sum(dim=1))


class Pair(nn.Module):
    """The two towers, under the names that open_clip's models have."""

    def __init__(self, visual: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.visual, self.text = visual, text

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)


def create(params: LocalParams, vit: Any, sentences: Sequence[str], room: int) -> Critic:
    """A critic with random weights. vit: a backbone of the column's family; sentences: all that it will ever read; room: prompt vectors
    that a sentence may hold. ValueError where the ViT cannot see images of that size."""
    if params.image_size % vit.stride:
        raise ValueError(
            f"local_critic.image_size {params.image_size} is no multiple of the ViT's stride {vit.stride} (edit params.yaml)"
        )
    words = Tokens(10**6, sentences)
    longest = max(len(words.numbers(text)) for text in sentences) + room + 2
    tokens = Tokens(longest, sentences)
    config: dict[str, Any] = {
        "context_length": longest,
        "vocab_size": tokens.known,
        "width": params.width,
        "heads": params.heads,
        "layers": params.layers,
        "output_dim": params.width,
    }
    return Critic(Pair(ImageTower(vit, params.width), TextTransformer(**config)), tokens, vit.normalise, params.image_size)


def start_from(critic: Critic, backbone: ClassTokenVit) -> None:
    """Gives the image tower the weights of the network's ViT, its class tokens made one."""
    tower: Any = critic.net.get_submodule("visual")
    own = tower.net.state_dict()  # its final norm stays as it is where the network applies none
    tower.net.load_state_dict(own | backbone.plain_weights(tower.net))


@dataclass(frozen=True)
class Shown:
    """What a lesson is about.

    images f32[b,3,s,s] as critic.prepared gives them; valid f32[b,s,s] 0 on padding; scores f32[b,c,s,s] in 0..1, 0 for classes that are
    not tagged and on padding; tags f32[b,c]
    """

    images: Tensor
    valid: Tensor
    scores: Tensor
    tags: Tensor


def lesson(critic: Critic, params: LocalParams, given: Shown, texts: Tensor) -> Tensor:
    """The loss of one batch, a scalar. texts: f32[c+1,d], vectors of the classes' sentences, then of the one for surroundings."""
    shown, targets = views(given, params)
    cosines = critic.images(shown) @ texts.t()
    return F.binary_cross_entropy_with_logits(params.sharpness * (cosines - MIDDLE), targets)


def views(given: Shown, params: LocalParams) -> tuple[Tensor, Tensor]:
    """f32[v*b,3,s,s] and how well each matches the sentences, f32[v*b,c+1] in 0..1. Draws from torch's global generator."""
    images, scores = given.images * given.valid[:, None], given.scores
    rest = given.valid[:, None] - scores.amax(dim=1, keepdim=True)
    evidence = torch.cat([scores**EVIDENCE_POWER, rest.clamp(min=0)], dim=1)
    shown, targets = [], []
    for _ in range(params.views):
        kind = torch.randint(len(KINDS), (len(images),), device=images.device)
        seen = _seen(scores, kind, params.cells)
        hidden = 1 - seen
        match = _match(masking.visible_share(evidence, seen), given.tags, (kind != OUTSIDE).float())
        pasted = (torch.rand(len(images), device=images.device) < params.paste).float()
        also = _match(
            masking.visible_share(torch.roll(evidence, 1, dims=0), hidden),
            torch.roll(given.tags, 1, dims=0) * (hidden.mean(dim=(1, 2)) > GLIMPSE)[:, None],
            torch.ones_like(pasted),
        )
        other = torch.roll(images, 1, dims=0) * hidden[:, None]
        shown.append(images * seen[:, None] + other * pasted[:, None, None, None])
        targets.append(torch.maximum(match, also * pasted[:, None]))
    return torch.cat(shown), torch.cat(targets)


def _match(share: Tensor, tags: Tensor, by_tags: Tensor) -> Tensor:
    """f32[b,c+1]: of the classes the tags where by_tags f32[b] is 1, else the share of their evidence; of the rest always its share."""
    classes = by_tags[:, None] * tags + (1 - by_tags[:, None]) * share[:, :-1]
    return torch.cat([classes, share[:, -1:]], dim=1)


def _seen(scores: Tensor, kind: Tensor, cells: int) -> Tensor:
    """What is left to see of each image, f32[b,s,s] in 0..1. kind: i64[b], numbers of KINDS."""
    b, size = len(scores), (scores.shape[-2], scores.shape[-1])
    powers = WIDEST ** torch.rand(b, 1, 1, device=scores.device)
    region = masking.blobs(b, size, cells, scores)
    kinds = torch.stack([torch.ones_like(region), region, region, 1 - scores.amax(dim=1) ** powers])
    return kinds[kind, torch.arange(b, device=scores.device)]


def tower_parameters(critic: Critic) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those of the ViT, and all others."""
    tower: Any = critic.net.get_submodule("visual")
    fine = list(tower.net.parameters())
    known = {id(p) for p in fine}
    return fine, [p for p in critic.parameters() if id(p) not in known]
