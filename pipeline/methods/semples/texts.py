"""Unit vectors of class texts, prompts and what is suppressed, in the space of a critic.

Shape letters: c classes, k vectors of a prompt, w channels of a token embedding, d channels of the critic's space.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.methods.semples.clip import CachedTensor, Critic
from pipeline.methods.semples.prompts import PromptParams, prompt_embeddings
from pipeline.methods.semples.sentences import Sentences


class TextEmbeddings:
    """Vectors without gradient are computed once, and again after the weights behind them have changed."""

    def __init__(self, sentences: Sentences, prompt: PromptParams) -> None:
        self.sentences, self.prompt = sentences, prompt
        self._classes, self._suppressed = CachedTensor(), CachedTensor()

    def of_classes(self, critic: Critic) -> Tensor:
        """f32[c,d], without gradient: of each class the mean over all its sentences."""
        return self._classes(critic.parameters(), lambda: critic.mean_texts(self.sentences.of_classes()))

    def with_background(self, critic: Critic, background: str) -> Tensor:
        """f32[c+1,d], with gradient to the critic: as of_classes, and last the mean over the sentences about
        `background`."""
        return critic.mean_texts([*self.sentences.of_classes(), self.sentences.of_phrases([background])])

    def of_prompts(self, critic: Critic, prompts: Tensor) -> Tensor:
        """Prompts f32[·,k,w] → f32[·,d], with gradient to the prompts."""
        return prompt_embeddings(critic, self.prompt, self.sentences.templates[0], prompts)

    def suppressed(self, critic: Critic, prompts: Tensor | None) -> Tensor:
        """f32[c,d], without gradient: of each class what is suppressed in its masks. Prompts f32[c,k,w]; None: the params
        have phrases in their place."""
        if prompts is not None:
            return self._suppressed([*critic.parameters(), prompts], lambda: self.of_prompts(critic, prompts))
        phrases, classes = [self.sentences.of_phrases(self.prompt.words)], len(self.sentences.names)
        return self._suppressed(critic.parameters(), lambda: critic.mean_texts(phrases).expand(classes, -1))
