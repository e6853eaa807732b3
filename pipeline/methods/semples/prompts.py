"""Params of a prompt + a critic → vectors of what is suppressed beside each class, as SemPLeS has it.

A prompt is a sequence of vectors that stand in a sentence where words would. Shape letters: c classes, k prompt vectors, w channels of
a token, d channels of the critic's space.
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

WHERE = "train.<m>.model.prompt"


@dataclass(frozen=True)
class PromptFile:
    """The authors' prompts: a file with `prompts` [c,k,w], and its sha256."""

    path: str
    sha256: str


@dataclass(frozen=True)
class PromptParams:
    """What is suppressed: the part of train.<m>.model.prompt that is no schedule.

    source    learned (published) | file: given, frozen | random: as drawn, frozen | words: the mean of some phrases, frozen
    length    vectors of a prompt (published 30)
    start     of the vectors: uniform in 0..1 (published) | normal, as CLIP starts its words: deviation 0.02
    around    null (published), or a phrase whose tokens, repeated, are added to the vectors: with start normal, a prompt begins as that
              phrase. A prompt that begins below a cosine of 0 with what it is to match has no gradient, and stays there
    words     phrases that name surroundings; source words reads them
    file      source file reads it
    official_tokens   the full stop after the prompt is the one of the authors' program, not of English; for their files
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


def drawn(params: PromptParams, classes: int, width: int) -> Tensor:
    """f32[c,k,w] that prompts start as. Draws from torch's global generator."""
    size = (classes, params.length, width)
    return torch.rand(size) if params.start == "uniform" else 0.02 * torch.randn(size)


def read(file: PromptFile, shape: tuple[int, ...]) -> Tensor:
    """f32[shape] of a file. FileNotFoundError, ValueError: it is missing, another one, or holds no such prompts."""
    check_file(Path(file.path), file.sha256, f"{WHERE}.file of params.yaml")
    return fitting(weights.read_weights(Path(file.path)), shape, file.path)


def fitting(tensors: Mapping[str, Tensor], shape: tuple[int, ...], source: str) -> Tensor:
    """`prompts` of a file of the authors, COCO's 90 ids made 80 classes. ValueError where they are not of that shape (c, k, w).

    source: the file, for the error.
    """
    given = tensors.get("prompts")
    if given is not None and len(given) == COCO_IDS:
        given = given[[number - 1 for number in COCO_USED_IDS]]
    if given is None or given.shape != shape:
        found = "none" if given is None else f"some of shape {tuple(given.shape)}"
        raise ValueError(
            f"{source} should hold `prompts` of shape {tuple(shape)} (classes, prompt.length, channels of a token), but holds {found}: "
            f"edit {WHERE} in params.yaml"
        )
    return given


def vectors(critic: Critic, params: PromptParams, template: str, prompts: Tensor) -> Tensor:
    """Prompts f32[c,k,w] in the template's place → unit vectors f32[c,d], with gradient to the prompts."""
    if params.around is not None:
        prompts = prompts + critic.words(params.around, params.length)
    return critic.prompts(prompts, template, official=params.official_tokens)


def told(params: PromptParams) -> str:
    """What is suppressed, in words for the report."""
    if params.source == "words":
        return f"the mean of the phrases {', '.join(params.words)}, the same for every class"
    source = {
        "learned": f"a learned prompt of each class, {params.length} vectors",
        "random": f"a random prompt of each class, {params.length} vectors as they were drawn: nothing was learned",
        "file": f"a prompt of each class from {params.file.path if params.file else ''}",
    }[params.source]
    return source + (f", added to the phrase {params.around}" if params.around else "")
