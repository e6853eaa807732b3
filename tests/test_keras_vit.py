"""ViT-PCM's Keras weights become the same network in torch: layouts against small programs in NumPy, wrong files by name."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from pipeline.core import plugins
from pipeline.methods.apc import method as apc
from tests.test_apc import made


def keras_lstm(given: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """One direction, f32[steps,dim] → f32[steps,width]; Keras's gate order i f c o."""

    def sigmoid(values: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-values))

    width = len(recurrent)
    hidden, cell, out = np.zeros(width), np.zeros(width), []
    for step in given:
        i, f, c, o = np.split(step @ kernel + hidden @ recurrent + bias, 4)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(c)
        hidden = sigmoid(o) * np.tanh(cell)
        out.append(hidden)
    return np.stack(out)


WIDTH, HIDDEN = 192, 6


def keras_weights(context: bool = True, classes: int = 4) -> dict[str, np.ndarray]:
    """Random arrays under vit-keras's names: a ViT-Ti for 32 px."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding/kernel": (16, 16, 3, WIDTH), "embedding/bias": (WIDTH,), "class_token/cls": (1, 1, WIDTH),
        "Transformer/posembed_input/pos_embedding": (1, 5, WIDTH), "Transformer/encoder_norm/gamma": (WIDTH,),
        "Transformer/encoder_norm/beta": (WIDTH,),
        "patch_classifier/classifier/kernel": (4 * HIDDEN if context else WIDTH, classes),
    }  # fmt: skip
    for block in range(12):
        name = f"Transformer/encoderblock_{block}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{name}/{norm}/gamma": (WIDTH,), f"{name}/{norm}/beta": (WIDTH,)}
        for part in ("query", "key", "value", "out"):
            attention = f"{name}/MultiHeadDotProductAttention_1/{part}"
            shapes |= {f"{attention}/kernel": (WIDTH, WIDTH), f"{attention}/bias": (WIDTH,)}
        for part, size in (("Dense_0", (WIDTH, 4 * WIDTH)), ("Dense_1", (4 * WIDTH, WIDTH))):
            shapes |= {f"{name}/MlpBlock_3/{part}/kernel": size, f"{name}/MlpBlock_3/{part}/bias": size[1:]}
    for axis in ("rows", "cols") if context else ():
        for way in ("forward", "backward"):
            name = f"patch_conditioning/{axis}/{way}"
            shapes |= {f"{name}/kernel": (WIDTH, 4 * HIDDEN), f"{name}/recurrent_kernel": (HIDDEN, 4 * HIDDEN)}
            shapes |= {f"{name}/bias": (4 * HIDDEN,)}
    return {name: (0.2 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def test_keras_weights_of_vit_pcm_lie_where_they_belong() -> None:
    weights = keras_weights()
    method = apc.Method.from_official({f"{name}:0": value for name, value in weights.items()})
    assert method.params.image_size == 32 and method.params.pooling.rule == "max" and method.params.context_width == HIDDEN
    assert method.phases()[0].name == "head" and not method.training
    image = np.random.default_rng(1).standard_normal((32, 32, 3)).astype(np.float32)
    patch = image[:16, 16:].reshape(-1) @ weights["embedding/kernel"].reshape(-1, WIDTH) + weights["embedding/bias"]
    embedded = method.backbone.net.patch_embed(torch.from_numpy(image).permute(2, 0, 1)[None])
    np.testing.assert_allclose(embedded.detach().reshape(4, WIDTH)[1].numpy(), patch, atol=1e-3)
    attention, token = "Transformer/encoderblock_3/MultiHeadDotProductAttention_1", image[0, :, 0][:1].repeat(WIDTH)
    three = method.backbone.net.blocks[3].attn.qkv(torch.from_numpy(token)).detach().numpy()
    for at, part in enumerate(("query", "key", "value")):
        expected = token @ weights[f"{attention}/{part}/kernel"] + weights[f"{attention}/{part}/bias"]
        np.testing.assert_allclose(three[at * WIDTH : (at + 1) * WIDTH], expected, atol=1e-3)
    assert method.score_maps(torch.rand(1, 3, 32, 48), apc.Options("patch")).scores.shape == (1, 3, 2, 3)


def test_the_context_is_keras_bidirectional_lstm_along_rows_and_columns() -> None:
    weights = keras_weights()
    method = apc.Method.from_official(weights)
    assert method.context is not None
    given = np.random.default_rng(2).standard_normal((WIDTH, 3, 4)).astype(np.float32)
    in_context = method.context(torch.from_numpy(given)[None], 0.0)[0].detach().numpy()

    def along(axis: str, way: str, steps: np.ndarray) -> np.ndarray:
        name = f"patch_conditioning/{axis}/{way}"
        return keras_lstm(steps, *(weights[f"{name}/{part}"] for part in ("kernel", "recurrent_kernel", "bias")))

    for y in range(3):
        for x in range(4):
            row, column = given[:, y].T, given[:, :, x].T
            expected = np.concatenate(
                [
                    along("rows", "forward", row)[x],
                    along("rows", "backward", row[::-1])[3 - x],
                    along("cols", "forward", column)[y],
                    along("cols", "backward", column[::-1])[2 - y],
                ]
            )
            np.testing.assert_allclose(in_context[:, y, x], expected, atol=1e-4)


def test_keras_weights_without_context_load_too() -> None:
    method = apc.Method.from_official(keras_weights(context=False, classes=3))
    assert method.context is None and len(method.classifier.weight) == 3


def test_keras_weights_that_miss_or_are_unknown_are_named() -> None:
    weights = keras_weights()
    del weights["Transformer/encoder_norm/beta"]
    weights["predictions/kernel"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"encoder_norm/beta is missing; predictions/kernel is unknown"):
        apc.Method.from_official(weights)
    narrow = keras_weights() | {"Transformer/posembed_input/pos_embedding": np.zeros((1, 5, 100), np.float32)}
    with pytest.raises(ValueError, match=r"100 channels wide; there are 192, 384, 768"):
        apc.Method.from_official(narrow)


def test_an_h5_file_of_keras_starts_a_run_and_leaves_the_decoder_at_random(tmp_path: Path) -> None:
    weights = keras_weights()
    with h5py.File(tmp_path / "vit_pcm.h5", "w") as file:
        for name, value in weights.items():  # Keras repeats a layer's name inside its group
            file[f"{name.split('/')[0]}/{name}:0"] = value
    method = made(architecture="vit_tiny_patch16_384", image_size=32, context="bilstm", context_width=HIDDEN)
    method.load_initial(plugins.load("nn", "vit"), tmp_path / "vit_pcm.h5")
    expected = apc.Method.from_official(weights).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in method.state_dict().items() if name in expected)
    assert method.decoder is not None and set(method.state_dict()) - set(expected)
