"""Class names → sentences → token numbers in CLIP's vocabulary. Shape letters: m sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

PLACEHOLDER = "{}"  # in a template: where a class name, or the prompt, goes
FULL_STOP, OFFICIAL_FULL_STOP = 269, 13  # "." as a word; "." within a word, which the authors' prompts were trained with


@dataclass(frozen=True)
class Sentences:
    """Sentences that name classes.

    templates  each with one placeholder
    names      of each class, one or more
    """

    templates: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]

    def of_classes(self) -> list[list[str]]:
        """Of each class: every template with every name of the class."""
        return [self.of_phrases(names) for names in self.names]

    def of_phrases(self, phrases: Iterable[str]) -> list[str]:
        """Every template with every phrase in its place."""
        return [template.replace(PLACEHOLDER, phrase) for template in self.templates for phrase in phrases]


class Tokeniser:
    """Sentences → token numbers, by CLIP's byte-pair encoding. All lengths are in tokens.

    sentences: where given, only tokens that occur in these are known, renumbered in their old order, so that a small model
    has few embeddings to learn.
    """

    def __init__(self, length: int, sentences: Iterable[str] | None = None) -> None:
        """length: of a sentence with start, end and padding."""
        self.length, self._tokeniser = length, _clip_tokeniser()
        start, end = self._tokeniser.sot_token_id, self._tokeniser.eot_token_id
        self._renumbering: dict[int, int] | None = None
        self.vocabulary_size = int(self._tokeniser.vocab_size)
        if sentences is not None:
            used = {0, start, end} | {number for text in sentences for number in self._tokeniser.encode(text)}
            self._renumbering = {number: position for position, number in enumerate(sorted(used))}
            self.vocabulary_size = len(used)
        self.start, self.end = self._renumbered([start, end])

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """i64[m,length]. ValueError where one is too long: cut off, it would lose its end token, at which CLIP reads a
        text."""
        return self._padded([[self.start, *self.numbers(text), self.end] for text in sentences])

    def numbers(self, text: str) -> list[int]:
        """Its tokens, without start, end and padding."""
        return self._renumbered(self._tokeniser.encode(text))

    def with_prompt(self, template: str, prompt_length: int, *, official: bool) -> tuple[Tensor, int]:
        """The template with a prompt in its place: token numbers i64[1,length], and the position of the prompt's first
        token. At the prompt stand start tokens, whose embeddings the prompt's vectors are to replace.

        official: the full stop after the prompt is the authors', "." within a word.
        """
        before, _, after = template.partition(PLACEHOLDER)
        rest = self.numbers(after)
        if official:
            rest = [OFFICIAL_FULL_STOP if number == FULL_STOP else number for number in rest]
        row = [self.start, *self.numbers(before), *[self.start] * prompt_length, *rest, self.end]
        return self._padded([row]), 1 + len(self.numbers(before))

    def _renumbered(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers) if self._renumbering is None else [self._renumbering[number] for number in numbers]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows), default=0)
        if longest > self.length:
            raise ValueError(
                f"a sentence has {longest} tokens, but the critic reads {self.length}: shorten templates, class names or "
                "prompt.length in train.model of the recipe"
            )
        padded = torch.zeros(len(rows), self.length, dtype=torch.long)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = torch.tensor(row)
        return padded


@lru_cache(maxsize=1)
def _clip_tokeniser() -> SimpleTokenizer:
    return SimpleTokenizer()
