"""ViT-PCM's Keras weights {name: array} → our state dict. Names and layouts are those of vit-keras (docs/methods/apc.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from pipeline.core.problems import listed

# Names may be nested in groups of an .h5 file, which repeat the layer's name: a name is read from the last of these words on
ROOTS = ("embedding", "class_token", "Transformer", "patch_conditioning", "patch_classifier")
WIDTHS = {192: "tiny", 384: "small", 768: "base"}
PATCH = 16
CLASSIFIER = "patch_classifier/classifier/kernel"

Rule = tuple[
    tuple[str, ...], Callable[..., np.ndarray]
]  # Keras names, and the function from their arrays to a tensor of ours


def read(path: Path) -> dict[str, np.ndarray]:
    """Every array of an HDF5 file of Keras weights, by its path in the file."""
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item)

    with h5py.File(path, "r") as file:
        file.visititems(add)
    return arrays


def converted(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Keras names → our keys (backbone.net.*, context.*, classifier.weight). ValueError lists missing and unknown names."""
    arrays = {_plain(name): np.asarray(value, np.float32) for name, value in weights.items()}
    blocks = {name.split("/")[1] for name in arrays if name.startswith("Transformer/encoderblock_")}
    rules = _rules(len(blocks), any(name.startswith("patch_conditioning/") for name in arrays))
    required = [name for names, _ in rules.values() for name in names]
    problems = [f"{name} is missing" for name in required if name not in arrays]
    problems += [f"{name} is unknown" for name in arrays if name not in set(required)]
    if problems:
        raise ValueError(f"these are no weights of ViT-PCM: {listed(problems, '; ')}")
    return {
        name: torch.from_numpy(np.ascontiguousarray(convert(*(arrays[keras_name] for keras_name in names))))
        for name, (names, convert) in rules.items()
    }


def architecture_of(tensors: Mapping[str, Tensor]) -> tuple[str, int]:
    """timm's name of the ViT whose converted weights these are, and the image size in px of its position embeddings.

    ValueError for a ViT of another width than ViT-Ti/S/B.
    """
    tokens, width = tensors["backbone.net.pos_embed"].shape[1:]
    if width not in WIDTHS:
        raise ValueError(f"these weights are {width} channels wide; there are {', '.join(map(str, WIDTHS))}")
    return f"vit_{WIDTHS[width]}_patch16_384", PATCH * round((tokens - 1) ** 0.5)


def _plain(name: str) -> str:
    """vit-b16/embedding/embedding/kernel:0 → embedding/kernel."""
    parts = name.removesuffix(":0").split("/")
    starts = [at for at, part in enumerate(parts) if part in ROOTS]
    return "/".join(parts[starts[-1] :] if starts else parts)


def _rules(blocks: int, context: bool) -> dict[str, Rule]:
    """Our key → its rule. Keras keeps matrices [in, out] and convolutions [h, w, in, out]."""
    rules: dict[str, Rule] = {
        "backbone.net.patch_embed.proj.weight": (("embedding/kernel",), lambda kernel: kernel.transpose(3, 2, 0, 1)),
        "backbone.net.patch_embed.proj.bias": (("embedding/bias",), np.asarray),
        "backbone.net.cls_token": (("class_token/cls",), np.asarray),
        "backbone.net.pos_embed": (("Transformer/posembed_input/pos_embedding",), np.asarray),
        "classifier.weight": ((CLASSIFIER,), lambda kernel: kernel.T[..., None, None]),
    }
    rules |= _norm("backbone.net.norm", "Transformer/encoder_norm")
    for block in range(blocks):
        ours, theirs = f"backbone.net.blocks.{block}", f"Transformer/encoderblock_{block}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        qkv = tuple(f"{attention}/{part}" for part in ("query", "key", "value"))
        rules |= _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0") | _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
        rules |= _dense(f"{ours}.attn.qkv", *qkv) | _dense(f"{ours}.attn.proj", f"{attention}/out")
        rules |= _dense(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_3/Dense_0")
        rules |= _dense(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_3/Dense_1")
    for axis in ("rows", "cols") if context else ():
        for way, suffix in (("forward", ""), ("backward", "_reverse")):
            rules |= _lstm(f"context.{axis}", suffix, f"patch_conditioning/{axis}/{way}")
    return rules


def _norm(ours: str, theirs: str) -> dict[str, Rule]:
    return {f"{ours}.weight": ((f"{theirs}/gamma",), np.asarray), f"{ours}.bias": ((f"{theirs}/beta",), np.asarray)}


def _dense(ours: str, *theirs: str) -> dict[str, Rule]:
    """A linear layer whose outputs are those of several Keras layers, concatenated."""
    return {
        f"{ours}.weight": (
            tuple(f"{name}/kernel" for name in theirs),
            lambda *kernels: np.concatenate([kernel.T for kernel in kernels]),
        ),
        f"{ours}.bias": (tuple(f"{name}/bias" for name in theirs), lambda *biases: np.concatenate(biases)),
    }


def _lstm(ours: str, suffix: str, theirs: str) -> dict[str, Rule]:
    """A direction of an LSTM. Gates lie in the same order, i f c o; Keras has one bias, torch adds two: the second is 0."""
    return {
        f"{ours}.weight_ih_l0{suffix}": ((f"{theirs}/kernel",), np.transpose),
        f"{ours}.weight_hh_l0{suffix}": ((f"{theirs}/recurrent_kernel",), np.transpose),
        f"{ours}.bias_ih_l0{suffix}": ((f"{theirs}/bias",), np.asarray),
        f"{ours}.bias_hh_l0{suffix}": ((f"{theirs}/bias",), np.zeros_like),
    }
