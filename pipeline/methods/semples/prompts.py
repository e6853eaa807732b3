"""Learned prompts: their params, initial values and files, and their unit vectors in the critic's space.

A prompt is a sequence of vectors that stand where a sentence has the embeddings of words. SemPLeS learns one per class,
which describes what surrounds the class, and suppresses it in the class' masks. Shape letters: c classes, k vectors of a
prompt, w channels of a token embedding, d channels of the critic's space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline.core.config import Positive
from pipeline.methods.semples.clip import Critic, check_file
from pipeline.nn import weights
from pipeline.nn.vit.coco_ids import COCO_IDS, COCO_USED_IDS

WHERE = "train.model.prompt"


@dataclass(frozen=True)
class PromptFile:
    """The authors' prompts.

    path    of a file with `prompts` f[c,k,w]
    sha256  of that file, 64 hexadecimal digits
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class PromptParams:
    """What is suppressed: train.model.prompt without its schedule.

    source    learned (published) | file: given, frozen | random: as drawn, frozen | words: the mean of some phrases, frozen
    length    vectors of a prompt (published 30)
    start     initial vectors: uniform in 0..1 (published), or normal with deviation 0.02, as CLIP initialises token
              embeddings
    around    null (published), or a phrase whose token embeddings, repeated to `length`, are added to the vectors: with
              start normal, the prompt begins near that phrase. A prompt whose cosine with what it is to match is below 0 has
              no gradient (cosines are clamped), and would stay there
    words     phrases that name surroundings, for source words
    file      for source file
    official_tokens   whether the full stop after the prompt is the authors' token ("." within a word); for their files
    """

    source: Literal["learned", "file", "random", "words"]
    length: Positive
    start: Literal["uniform", "normal"]
    around: str | None
    words: tuple[str, ...]
    file: PromptFile | None
    official_tokens: bool

    def __post_init__(self) -> None:
        if (self.source == "words") != bool(self.words):
            raise ValueError(
                f"source {self.source} with words {list(self.words)}: words are for source words, which needs some"
            )
        if self.around is not None and not self.around.strip():
            raise ValueError("around '': allowed is null, or a phrase")
        if (self.source == "file") != (self.file is not None):
            raise ValueError(f"source {self.source} with file {self.file}: file is for source file, which needs it")


def initial_prompts(params: PromptParams, classes: int, width: int) -> Tensor:
    """f32[c,k,w], drawn from torch's global generator. width: w."""
    size = (classes, params.length, width)
    return torch.rand(size) if params.start == "uniform" else 0.02 * torch.randn(size)


def read_prompts(file: PromptFile, shape: tuple[int, ...]) -> Tensor:
    """Prompts f32[c,k,w] of a file. FileNotFoundError, ValueError: the file is missing, another one, or holds no such
    prompts."""
    check_file(Path(file.path), file.sha256, f"{WHERE}.file of the recipe")
    return published_prompts(weights.read_weights(Path(file.path)), shape, file.path)


def published_prompts(tensors: Mapping[str, Tensor], shape: tuple[int, ...], source: str) -> Tensor:
    """`prompts` of a file of the authors, those of COCO's 90 ids reduced to its 80 classes. ValueError where they are not of
    `shape`, which is (c, k, w).

    source: the file, for the error.
    """
    prompts = tensors.get("prompts")
    if prompts is not None and len(prompts) == COCO_IDS:
        prompts = prompts[[number - 1 for number in COCO_USED_IDS]]
    if prompts is None or prompts.shape != shape:
        actual = "none" if prompts is None else f"some of shape {tuple(prompts.shape)}"
        raise ValueError(
            f"{source} should hold `prompts` of shape {tuple(shape)} (classes, prompt.length, channels of a token), but "
            f"holds {actual}: edit {WHERE} in the recipe"
        )
    return prompts


def prompt_embeddings(critic: Critic, params: PromptParams, template: str, prompts: Tensor) -> Tensor:
    """Prompts f32[c,k,w] in the template's place → unit vectors f32[c,d], with gradient to the prompts."""
    if params.around is not None:
        prompts = prompts + critic.phrase_vectors(params.around, params.length)
    return critic.embed_prompts(prompts, template, official=params.official_tokens)


def description(params: PromptParams) -> str:
    """What is suppressed, in words for the report."""
    if params.source == "words":
        return f"the mean of the phrases {', '.join(params.words)}, the same for every class"
    source = {
        "learned": f"a learned prompt of each class, {params.length} vectors",
        "random": f"a random prompt of each class, {params.length} vectors as they were drawn: nothing was learned",
        "file": f"a prompt of each class from {params.file.path if params.file else ''}",
    }[params.source]
    return source + (f", added to the phrase {params.around}" if params.around else "")
