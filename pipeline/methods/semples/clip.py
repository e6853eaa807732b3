"""The critic of SemPLeS: images, sentences and learned prompts → unit vectors of one space, by any model of open_clip.

open_clip builds the model; its weights come from a local file that is checked by sha256 and read without running pickled
code: no network is needed. The cosine of two vectors says how well an image and a text match. Shape letters: b images, m
sentences or masked images, k vectors of a prompt, w channels of a token embedding, d channels of a unit vector.
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
from pipeline.methods.semples.sentences import Tokeniser
from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import open_clip  # noqa: E402

Normalisation = Literal["clip", "imagenet"]
LOSS_PARAMETERS = ("logit_scale", "logit_bias")  # of the contrastive loss that the model was trained with; not used here
WHERE = "train.model.critic of the recipe"


@dataclass(frozen=True)
class CriticFile:
    """train.model.critic: a published image-text model.

    model    a model of open_clip that reads CLIP's own vocabulary; OpenAI's weights need one whose name ends in -quickgelu
    weights  a local file with open_clip's key names, .safetensors or .pt
    sha256   of that file, 64 hexadecimal digits (`sha256sum FILE` prints them)
    """

    model: str
    weights: str
    sha256: str

    def __post_init__(self) -> None:
        if self.model not in models():
            similar = [name for name in models() if name.lower().startswith(self.model.lower()[:5])] or models()
            raise ValueError(f"open_clip has no model {self.model!r} that can be a critic; near it: {', '.join(similar)}")
        if len(self.sha256) != 64 or set(self.sha256.lower()) - set("0123456789abcdef"):
            raise ValueError(
                f"sha256 {self.sha256!r} is none: allowed are 64 hexadecimal digits, as `sha256sum {self.weights}` "
                "prints them"
            )


@lru_cache(maxsize=1)
def models() -> list[str]:
    """Names of open_clip's models that read CLIP's own vocabulary; the others fetch a tokeniser from a hub."""
    names = []
    for name in open_clip.list_models():
        text: dict[str, Any] = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
        if not text.get("hf_model_name") and not text.get("hf_tokenizer_name"):
            names.append(name)
    return names


def text_width(model: str) -> int:
    """Channels of a token embedding of an open_clip model, known without its weights."""
    config: Any = open_clip.get_model_config(model)
    return int(config["text_cfg"]["width"])


class Critic(nn.Module):
    """An image-text model.

    net        has open_clip's `encode_image`, `encode_text` and token embedding
    normalise  RGB in 0..1 → what the net was trained on
    side       px of the square images that it takes
    """

    def __init__(self, net: nn.Module, tokeniser: Tokeniser, normalise: nn.Module, side: int) -> None:
        super().__init__()
        self.net, self.tokeniser, self.normalise, self.side = net, tokeniser, normalise, side

    def prepare(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1 → f32[b,3,side,side], resized and normalised, so that 0 is the mean colour."""
        if images.shape[-2:] != (self.side, self.side):
            images = F.interpolate(images, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        return self.normalise(images)

    def embed_images(self, prepared: Tensor) -> Tensor:
        """f32[m,3,side,side] as `prepare` gives them, masked or not → unit vectors f32[m,d]."""
        return F.normalize(self._net.encode_image(prepared).float(), dim=-1)

    def embed_texts(self, sentences: Sequence[str]) -> Tensor:
        """Unit vectors f32[m,d]."""
        return self._encode_text(self.tokeniser(sentences))

    def mean_texts(self, groups: Sequence[Sequence[str]]) -> Tensor:
        """Unit vectors f32[groups,d]: the normalised mean of each group of sentences."""
        vectors = self.embed_texts([text for texts in groups for text in texts])
        by_group = vectors.split([len(texts) for texts in groups])
        return F.normalize(torch.stack([group.mean(dim=0) for group in by_group]), dim=-1)

    def embed_prompts(self, prompts: Tensor, template: str, *, official: bool = False) -> Tensor:
        """Prompts f32[m,k,w] in the template's place → unit vectors f32[m,d], with gradient to the prompts.

        official: see Tokeniser.with_prompt.
        """
        tokens, first = self.tokeniser.with_prompt(template, prompts.shape[1], official=official)
        last = first + prompts.shape[1]

        def insert(module: nn.Module, inputs: Any, embedded: Tensor) -> Tensor:
            return torch.cat([embedded[:, :first], prompts.to(embedded.dtype), embedded[:, last:]], dim=1)

        hook = self.token_embedding.register_forward_hook(insert)
        try:
            return self._encode_text(tokens.expand(len(prompts), -1))
        finally:
            hook.remove()

    def phrase_vectors(self, phrase: str, length: int) -> Tensor:
        """f32[length,w], without gradient: embeddings of the phrase's tokens, repeated from the first until there are
        `length`."""
        numbers = self.tokeniser.numbers(phrase)
        repeated = [numbers[position % len(numbers)] for position in range(length)]
        return self.token_embedding(torch.tensor(repeated, device=self.token_embedding.weight.device)).detach()

    @property
    def token_embedding(self) -> nn.Embedding:
        """Token numbers → f32[·,w]."""
        text = self._net if hasattr(self.net, "token_embedding") else self._net.text
        return text.token_embedding

    @property
    def _net(self) -> Any:
        return self.net

    def _encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self._net.encode_text(tokens.to(self.token_embedding.weight.device)).float(), dim=-1)


class CachedTensor:
    """A tensor that is computed once, and again after the weights that it is computed from have been written to or moved."""

    def __init__(self) -> None:
        self._key: object = None
        self._value = torch.empty(0)

    def __call__(self, weights: Iterable[Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """compute() runs without gradient."""
        key = [(id(weight), weight._version, weight.device) for weight in weights]
        if key != self._key:
            # a tensor that is computed in inference mode could not be trained against later
            with torch.inference_mode(False), torch.no_grad():
                self._value = compute()
            self._key = key
        return self._value


def read_critic(file: CriticFile, normalisation: Normalisation) -> Critic:
    """The model of `file`, in eval mode and without gradient to its weights; the same object for the same file.

    normalisation: of the images: by the model's own statistics, or by ImageNet's, as in the authors' program.
    FileNotFoundError, ValueError: the file is missing, another one, or another model's.
    """
    check_file(Path(file.weights), file.sha256, WHERE)
    return _loaded(file, normalisation)


def check_file(path: Path, sha256: str, where: str) -> None:
    """FileNotFoundError, ValueError where a file is missing, or has another sha256. where: the key to edit, for the
    error."""
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: put the file there (docs/methods/semples.md), or name another in {where}"
        )
    actual = _sha256(path, path.stat().st_mtime_ns)
    if actual != sha256.lower():
        raise ValueError(f"{path} has sha256 {actual}, not {sha256}: put the right file there, or edit sha256 in {where}")


@lru_cache(maxsize=4)
def _sha256(path: Path, modified: int) -> str:
    """modified: when, so that a file that was written anew is read anew."""
    del modified
    return store.file_digest(path)


@lru_cache(maxsize=1)
def _loaded(file: CriticFile, normalisation: Normalisation) -> Critic:
    with torch.random.fork_rng(devices=[]), _no_log():  # initial weights must not advance the run's random generator
        net: Any = open_clip.create_model(file.model, pretrained_text=False)
    tensors = _read(Path(file.weights))
    unused = {name: value for name, value in net.state_dict().items() if name in LOSS_PARAMETERS}
    weights.load_exactly(
        net,
        {name: value for name, value in tensors.items() if name not in LOSS_PARAMETERS} | unused,
        f"{file.weights} as open_clip's {file.model}",
        advice=f"name the model that the file was saved from in {WHERE}",
    )
    return frozen_critic(net, normalisation)


def frozen_critic(net: Any, normalisation: Normalisation) -> Critic:
    """A model of open_clip, in eval mode and without gradient to its weights."""
    preprocessing: dict[str, Any] = net.visual.preprocess_cfg
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])
    if normalisation == "imagenet":
        mean, std = weights.IMAGENET_MEAN, weights.IMAGENET_STD
    side = net.visual.image_size
    side = side if isinstance(side, int) else side[0]
    length = int(getattr(net, "context_length", 0) or net.text.context_length)
    return Critic(net, Tokeniser(length), weights.Normalise(mean, std), side).eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return weights.read_weights(path)
    except Exception as error:  # an archive of a program, or no archive at all: each reader has errors of its own
        raise ValueError(
            f"{path} cannot be read as safetensors, nor as tensors without pickled code ({str(error).splitlines()[0]}): "
            f"save the model's state_dict() as .safetensors, and name that in {WHERE}"
        ) from error


@contextmanager
def _no_log() -> Iterator[None]:
    """Drops open_clip's warning that the model has no pretrained weights: they are loaded next."""
    root = logging.getLogger()

    def refuse(record: logging.LogRecord) -> bool:
        return False

    root.addFilter(refuse)
    try:
        yield
    finally:
        root.removeFilter(refuse)
