"""SemPLeS' three losses (section 3): unit vectors of masked images, class texts and prompts → weighted scalars.

Shape letters: p pairs of an image and a class that it is tagged with, d channels of the critic's space. Cosines are clamped
to 1e-4 … 0.9999 as in the authors' program, and so have no gradient beyond. Each loss is the mean over the pairs, 0 where
there is none.
"""

from __future__ import annotations

from torch import Tensor

LOWEST, HIGHEST = 1e-4, 0.9999


def segment_label_matching(inside: Tensor, outside: Tensor, texts: Tensor, *, background_weight: float) -> dict[str, Tensor]:
    """Section 3 (a): the masked-in image matches the class text, the masked-out one does not.

    inside, outside, texts: f32[p,d] of the masked-in images, the masked-out ones, and the text of each pair's class.
    """
    return {
        "matching": _mean(-_cosine(inside, texts).log()),
        "background": background_weight * _mean(-(1 - _cosine(outside, texts)).log()),
    }


def contrastive_prompt(outside: Tensor, texts: Tensor, prompts: Tensor, *, text_weight: float) -> dict[str, Tensor]:
    """Section 3 (b): the class' prompt matches the masked-out image, and is unlike the class text.

    outside, texts, prompts: f32[p,d] of the masked-out images, and of the text and the prompt of each pair's class.
    """
    return {
        "attraction": _mean(-_cosine(outside, prompts).log()),
        "repulsion": text_weight * _mean(_cosine(texts, prompts).log()),
    }


def prompt_suppression(inside: Tensor, prompts: Tensor, *, weight: float) -> dict[str, Tensor]:
    """Section 3 (c), beside segment_label_matching: the masked-in image does not match the class' prompt.

    inside, prompts: f32[p,d] of the masked-in images, and of the prompt of each pair's class.
    """
    return {"suppression": weight * _mean(-(1 - _cosine(inside, prompts)).log())}


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum(dim=1).clamp(LOWEST, HIGHEST)


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(1, len(values))
