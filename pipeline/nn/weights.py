"""Weights files of backbones → tensors, and their way into a module; input normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core.problems import listed

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCRATCH = ".txt"  # an `init` that ends so starts from random weights
HUB = ".hub"  # an `init` that ends so holds the name of a timm model to fetch from its hub


class Normalise(nn.Module):
    """f32[b,3,h,w] RGB in 0..1 → the range that the backbone was trained on."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...] = IMAGENET_MEAN, std: tuple[float, ...] = IMAGENET_STD) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def read_weights(path: Path) -> dict[str, Tensor]:
    """A .safetensors or .pth/.pt file as f32 tensors; wrappers {"model": …} and {"state_dict": …} are opened.

    FileNotFoundError says where to put the file. No pickle is ever run: .pth files are read with weights_only.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"initial weights {path} are missing: put the file there (timm names its safetensors on the Hugging Face hub "
            "`model.safetensors`), or name another in methods.<m>.init or segmenter_init of params.yaml"
        )
    if path.suffix == ".safetensors":
        state: Mapping[str, object] = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    tensors = unwrapped(state)
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a state dict")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def load_exactly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    spoken: Callable[[str], str] = str,
    advice: str = "check architecture in params.yaml",
) -> None:
    """Every key of the module and no other. ValueError lists the keys that miss, are unknown, or have another shape.

    spoken: our key names → those of the file, for the error, which ends with the advice.
    """
    own = module.state_dict()
    problems = [f"{spoken(name)} is missing" for name in own if name not in tensors]
    problems += [f"{spoken(name)} is unknown" for name in tensors if name not in own]
    problems += [
        f"{spoken(name)} has shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{source} does not fit: {listed(problems, '; ')}; {advice}")
    module.load_state_dict(dict(tensors))


def load_whole(
    module: nn.Module,
    init: Path,
    mark: str,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    published_name: Callable[[str], str] = str,
) -> bool:
    """Loads a file that holds the whole module rather than a bare backbone; false where it does not: then the backbone is for
    the caller to load.

    mark: a key that only whole files have. Files of ours have `backbone.` keys; of others, `renamed` gives ours, and
    `published_name` turns ours back for errors.
    """
    if init.suffix in (SCRATCH, HUB):
        return False
    tensors = read_weights(init)
    if mark not in tensors:
        return False
    own = renamed is None or any(name.startswith("backbone.") for name in tensors)
    given = tensors if own or renamed is None else renamed(tensors)
    load_exactly(module, given, str(init), spoken=str if own else published_name)
    return True


def pad_to_stride(images: Tensor, backbone: Any) -> Tensor:
    """f32[b,3,h,w] → both sides multiples of the backbone's stride: padded right and bottom with what the network sees as 0."""
    h, w = images.shape[-2:]
    ph, pw = -h % backbone.stride, -w % backbone.stride
    if not ph and not pw:
        return images
    padded = backbone.normalise.mean.expand(len(images), 3, h + ph, w + pw).clone()
    padded[..., :h, :w] = images
    return padded


def unwrapped(state: Mapping[str, object]) -> dict[str, Tensor]:
    """A checkpoint's content → its state dict: the wrappers {"model": …} and {"state_dict": …} are opened, and the `module.` of
    data-parallel training is cut off."""
    for wrapper in ("model", "state_dict"):
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def load_matching(net: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Loads the backbone's keys; classifier heads and other extras in the file are left. ValueError lists what misses."""
    own = net.state_dict()
    missing = [name for name in own if name not in tensors]
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if missing or wrong:
        raise ValueError(
            f"{source} does not fit this backbone: {len(missing)} keys are missing {missing[:5]}, "
            f"{len(wrong)} have another shape {wrong[:5]}; check architecture and init in params.yaml"
        )
    net.load_state_dict({name: tensors[name] for name in own})


def hub_name(path: Path) -> str:
    """The timm model name in a .hub file."""
    return path.read_text(encoding="utf-8").strip()
