"""Weights files → tensors → modules, with errors that name the keys; input normalisation and padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core.problems import listed
from pipeline.nn.torchvision_guard import define_missing_operators

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCRATCH = ".txt"  # suffix of an `init` that stands for random weights
HUB = ".hub"  # suffix of an `init` that holds the name of a timm model, whose weights are fetched from timm's hub


class Normalise(nn.Module):
    """f32[b,3,h,w] RGB in 0..1 → (images - mean) / std per channel."""

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

    FileNotFoundError says where to put the file, ValueError that it is broken. No pickle is ever run: .pth files are read
    with weights_only.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"initial weights {path} are missing: `tag2mask weights list` says what there is and where it comes from, "
            "`tag2mask weights get NAME` puts it there; or name another file in methods.<run>.init or segmenter_init of "
            "params.yaml"
        )
    try:
        if path.suffix == ".safetensors":
            state: Mapping[str, object] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read as weights: {type(error).__name__}; `tag2mask weights check {path}` says why"
        ) from error
    tensors = unwrapped(state) if isinstance(state, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; expected a state dict")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def load_exactly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    spoken: Callable[[str], str] = str,
    advice: str = "check architecture in the recipe (`tag2mask weights check FILE` says what a file fits)",
) -> None:
    """Loads a state dict with every key of the module and no other. ValueError lists what is missing, unknown or misshapen.

    source: the file's name for the error; spoken: our key names → the file's, for the error; advice: the error's last words.
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


def initial_tensors(init: Path) -> dict[str, Tensor] | None:
    """What training starts from: a local file, or the model of timm's hub that a .hub file names; None for a .txt file.

    FileNotFoundError; ValueError where the file cannot be read as weights.
    """
    if init.suffix == SCRATCH and init.is_file():
        return None
    if init.suffix == HUB and init.is_file():
        define_missing_operators()
        import timm

        return timm.create_model(hub_name(init), pretrained=True, num_classes=0).state_dict()
    return read_weights(init)


def load_whole(
    module: nn.Module,
    init: Path,
    mark: str,
    renamed: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    published_name: Callable[[str], str] = str,
) -> bool:
    """Loads a file of the whole module, backbone and heads. False for a bare backbone, which the caller then loads.

    mark: a key that only files of the whole module have. Keys that begin with `backbone.` are ours; other keys are the
    authors', which `renamed` maps to ours; `published_name` maps ours back for errors.
    """
    if init.suffix in (SCRATCH, HUB):
        return False
    tensors = read_weights(init)
    if mark not in tensors:
        return False
    ours = renamed is None or any(name.startswith("backbone.") for name in tensors)
    state = tensors if ours or renamed is None else renamed(tensors)
    load_exactly(module, state, str(init), spoken=str if ours else published_name)
    return True


def pad_to_stride(images: Tensor, backbone: Any) -> Tensor:
    """f32[b,3,h,w] → both sides multiples of the backbone's stride: padded right and bottom with the mean."""
    h, w = images.shape[-2:]
    ph, pw = -h % backbone.stride, -w % backbone.stride
    if not ph and not pw:
        return images
    padded = backbone.normalise.mean.expand(len(images), 3, h + ph, w + pw).clone()
    padded[..., :h, :w] = images
    return padded


def unwrapped(state: Mapping[str, object]) -> dict[str, Tensor]:
    """A checkpoint's content → its state dict: out of the wrappers {"model": …} and {"state_dict": …}, without the prefix
    `module.` of data-parallel training."""
    for wrapper in ("model", "state_dict"):
        inner = state.get(wrapper)
        if isinstance(inner, Mapping):
            state = inner
    return {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}


def load_matching(net: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Loads the backbone's keys; other keys of the file are not read. ValueError lists missing keys and other shapes."""
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
            f"{len(wrong)} have another shape {wrong[:5]}; check architecture in the recipe and init in params.yaml "
            f"(`tag2mask weights check {source}` says what the file fits)"
        )
    net.load_state_dict({name: tensors[name] for name in own})


def hub_name(path: Path) -> str:
    """The timm model name in a .hub file."""
    return path.read_text(encoding="utf-8").strip()
