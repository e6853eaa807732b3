"""The critic of SemPLeS: images, sentences and prompts that are no words → unit vectors of one space, by any open_clip model.

The model is built by open_clip, its weights come from a local file that is checked by sha256 and read without running pickled code, and
its tokeniser is part of open_clip: nothing here needs a network. A cosine of two vectors says how well they match.
Shape letters: b images, m sentences or images to look at, k prompt vectors, w channels of a token, d channels of a unit vector.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.core import store
from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import open_clip  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402

Normalisation = Literal["clip", "imagenet"]
PLACE = "{}"  # in a template: where a class name, or the prompt, goes
UNREAD = ("logit_scale", "logit_bias")  # of the contrastive loss; a cosine is taken as it is
OFFICIAL_END, END = 13, 269  # "." within a word, which the authors' prompts were trained with, and "." as a word of its own
WHERE = "train.<m>.model.critic of params.yaml"


@dataclass(frozen=True)
class CriticFile:
    """train.<m>.model.critic: a published image-text model.

    model    a name of open_clip whose text is in CLIP's own vocabulary; OpenAI's weights want one that ends in -quickgelu
    weights  a local file with open_clip's key names, .safetensors or .pt
    sha256   of that file, 64 hexadecimal digits (`sha256sum FILE` prints them)
    """

    model: str
    weights: str
    sha256: str

    def __post_init__(self) -> None:
        if self.model not in models():
            near = [name for name in models() if name.lower().startswith(self.model.lower()[:5])] or models()
            raise ValueError(f"open_clip has no model {self.model!r} that can be a critic; near it: {', '.join(near)}")
        if len(self.sha256) != 64 or set(self.sha256.lower()) - set("0123456789abcdef"):
            raise ValueError(
                f"sha256 {self.sha256!r} is none: allowed are 64 hexadecimal digits, as `sha256sum {self.weights}` prints them"
            )


@dataclass(frozen=True)
class Sentences:
    """What is said of the classes. templates: each with one {}; names: of each class, one or more."""

    templates: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]

    def of_classes(self, before: str = "") -> list[list[str]]:
        """Of each class: all templates with all its names, `before` in front of the name."""
        return [self.of_phrases([before + name for name in names]) for names in self.names]

    def of_phrases(self, phrases: Iterable[str]) -> list[str]:
        return [template.replace(PLACE, phrase) for template in self.templates for phrase in phrases]


@lru_cache(maxsize=1)
def models() -> list[str]:
    """Names of open_clip's models that read CLIP's own vocabulary; the others fetch a tokeniser from a hub."""
    found = []
    for name in open_clip.list_models():
        text: dict[str, Any] = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        if not text.get("hf_model_name") and not text.get("hf_tokenizer_name"):
            found.append(name)
    return found


def text_width(model: str) -> int:
    """Channels of a token of an open_clip model, known without its weights."""
    config: Any = open_clip.get_model_config(model)
    return int(config["text_cfg"]["width"])


class Tokens:
    """Sentences → token numbers, in CLIP's byte pairs.

    sentences: where given, only tokens of these are known, numbered anew in their old order: a small model then has few rows to learn.
    """

    def __init__(self, length: int, sentences: Iterable[str] | None = None) -> None:
        """length: tokens of a sentence, start, end and padding included."""
        self.length, self._tokeniser = length, _tokeniser()
        start, end = self._tokeniser.sot_token_id, self._tokeniser.eot_token_id
        self._place: dict[int, int] | None = None
        self.known = int(self._tokeniser.vocab_size)
        if sentences is not None:
            used = {0, start, end} | {number for text in sentences for number in self._tokeniser.encode(text)}
            self._place = {number: place for place, number in enumerate(sorted(used))}
            self.known = len(used)
        self.start, self.end = self._placed([start, end])

    def __call__(self, sentences: Sequence[str]) -> Tensor:
        """i64[m,length]. ValueError where one is too long: it would lose its end, which is where a text is read."""
        return self._laid([[self.start, *self.numbers(text), self.end] for text in sentences])

    def numbers(self, text: str) -> list[int]:
        """Its tokens, without start and end."""
        return self._placed(self._tokeniser.encode(text))

    def prompted(self, template: str, count: int, *, official: bool) -> tuple[Tensor, int]:
        """i64[1,length], the template with `count` tokens in its place that prompt vectors take the place of, and the first of these.

        official: a full stop after the prompt is the token that the authors used, "." within a word.
        """
        before, _, after = template.partition(PLACE)
        ending = self.numbers(after)
        if official:
            ending = [OFFICIAL_END if number == END else number for number in ending]
        row = [self.start, *self.numbers(before), *[self.start] * count, *ending, self.end]
        return self._laid([row]), 1 + len(self.numbers(before))

    def _placed(self, numbers: Sequence[int]) -> list[int]:
        return list(numbers) if self._place is None else [self._place[number] for number in numbers]

    def _laid(self, rows: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, rows), default=0)
        if longest > self.length:
            raise ValueError(
                f"a sentence has {longest} tokens, but the critic reads {self.length}: shorten templates, class names or prompt.length "
                "in train.<m>.model of params.yaml"
            )
        found = torch.zeros(len(rows), self.length, dtype=torch.long)
        for at, row in enumerate(rows):
            found[at, : len(row)] = torch.tensor(row)
        return found


@lru_cache(maxsize=1)
def _tokeniser() -> SimpleTokenizer:
    return SimpleTokenizer()


class Critic(nn.Module):
    """net: whatever has open_clip's `encode_image`, `encode_text` and token embedding. side: px of the square images that it sees."""

    def __init__(self, net: nn.Module, tokens: Tokens, normalise: nn.Module, side: int) -> None:
        super().__init__()
        self.net, self.tokens, self.normalise, self.side = net, tokens, normalise, side

    def prepared(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1 → f32[b,3,side,side] in the range that it was trained on, where 0 is the mean colour."""
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.normalise(images)

    def images(self, prepared: Tensor) -> Tensor:
        """f32[m,3,side,side] as `prepared` gives them, masked or not → f32[m,d]."""
        return F.normalize(self._net.encode_image(prepared).float(), dim=-1)

    def sentences(self, texts: Sequence[str]) -> Tensor:
        """→ f32[m,d]."""
        return self._read(self.tokens(texts))

    def means(self, groups: Sequence[Sequence[str]]) -> Tensor:
        """f32[groups,d]: of each group of sentences the mean, a unit vector again."""
        each = self.sentences([text for texts in groups for text in texts]).split([len(texts) for texts in groups])
        return F.normalize(torch.stack([vectors.mean(dim=0) for vectors in each]), dim=-1)

    def prompts(self, vectors: Tensor, template: str, *, official: bool = False) -> Tensor:
        """f32[m,k,w] in the template's place → f32[m,d], with gradient to the vectors."""
        tokens, first = self.tokens.prompted(template, vectors.shape[1], official=official)
        last = first + vectors.shape[1]

        def put(module: nn.Module, given: Any, embedded: Tensor) -> Tensor:
            return torch.cat([embedded[:, :first], vectors.to(embedded.dtype), embedded[:, last:]], dim=1)

        hook = self.embedding.register_forward_hook(put)
        try:
            return self._read(tokens.expand(len(vectors), -1))
        finally:
            hook.remove()

    def words(self, phrase: str, count: int) -> Tensor:
        """f32[count,w]: the vectors of a phrase's tokens, from the first again when they are used up."""
        numbers = self.tokens.numbers(phrase)
        cycled = [numbers[at % len(numbers)] for at in range(count)]
        return self.embedding(torch.tensor(cycled, device=self.embedding.weight.device)).detach()

    @property
    def embedding(self) -> nn.Embedding:
        """Token numbers → f32[·,w]."""
        text = self._net if hasattr(self.net, "token_embedding") else self._net.text
        return text.token_embedding

    @property
    def _net(self) -> Any:
        return self.net

    def _read(self, tokens: Tensor) -> Tensor:
        return F.normalize(self._net.encode_text(tokens.to(self.embedding.weight.device)).float(), dim=-1)


class Remembered:
    """A tensor that is made once, and again after the weights that it is made from were written to or moved."""

    def __init__(self) -> None:
        self._key: object = None
        self._value = torch.empty(0)

    def __call__(self, weights: Iterable[Tensor], make: Callable[[], Tensor]) -> Tensor:
        """make() runs without gradient."""
        key = [(id(weight), weight._version, weight.device) for weight in weights]
        if key != self._key:
            with (
                torch.inference_mode(False),
                torch.no_grad(),
            ):  # what is made in an inference could not be trained against later
                self._value = make()
            self._key = key
        return self._value


def read_critic(file: CriticFile, normalisation: Normalisation) -> Critic:
    """The model of `file`, in eval mode and without gradient to its weights; the same object for the same file.

    normalisation: of the images it is shown: its own, or ImageNet's, as the authors did.
    FileNotFoundError, ValueError: the file is missing, another one, or another model's.
    """
    check_file(Path(file.weights), file.sha256, WHERE)
    return _built(file, normalisation)


def check_file(path: Path, sha256: str, where: str) -> None:
    """FileNotFoundError, ValueError where a file is not there, or not the one that was meant. where: the key to edit."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: put the file there (docs/methods/semples.md), or name another in {where}"
        )
    found = _sha256(path, path.stat().st_mtime_ns)
    if found != sha256.lower():
        raise ValueError(f"{path} has sha256 {found}, not {sha256}: put the right file there, or edit sha256 in {where}")


@lru_cache(maxsize=4)
def _sha256(path: Path, changed: int) -> str:
    """changed: when; a file that is written anew is read anew."""
    del changed
    return store.file_digest(path)


@lru_cache(maxsize=1)
def _built(file: CriticFile, normalisation: Normalisation) -> Critic:
    with torch.random.fork_rng(devices=[]), _silent():  # its random weights are none of the run's draws
        net: Any = open_clip.create_model(file.model, pretrained_text=False)
    tensors = _read(Path(file.weights))
    own = {name: value for name, value in net.state_dict().items() if name in UNREAD}
    weights.load_exactly(
        net,
        {name: value for name, value in tensors.items() if name not in UNREAD} | own,
        f"{file.weights} as open_clip's {file.model}",
        advice=f"name the model that the file was saved from in {WHERE}",
    )
    return wrapped(net, normalisation)


def wrapped(net: Any, normalisation: Normalisation) -> Critic:
    """A model of open_clip, in eval mode and without gradient to its weights."""
    shown: dict[str, Any] = net.visual.preprocess_cfg
    mean, std = tuple(shown["mean"]), tuple(shown["std"])
    if normalisation == "imagenet":
        mean, std = weights.IMAGENET_MEAN, weights.IMAGENET_STD
    side = net.visual.image_size
    side = side if isinstance(side, int) else side[0]
    length = int(getattr(net, "context_length", 0) or net.text.context_length)
    return Critic(net, Tokens(length), weights.Normalise(mean, std), side).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return weights.read_weights(path)
    except Exception as error:  # an archive of a program, or no archive at all: each reader has errors of its own
        raise ValueError(
            f"{path} cannot be read as safetensors, nor as tensors without pickled code ({str(error).splitlines()[0]}): save the model's "
            f"state_dict() as .safetensors, and name that in {WHERE}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """open_clip warns that the model has no weights; it is given them next."""
    root = logging.getLogger()

    def refuse(record: logging.LogRecord) -> bool:
        return False

    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)
