"""The critic takes any open_clip model from a file, says what is wrong with a wrong one, and reads prompts as it reads
words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.core import config
from pipeline.methods.semples import clip
from pipeline.methods.semples.clip import CachedTensor, CriticFile, read_critic
from pipeline.methods.semples.sentences import Tokeniser
from pipeline.nn import weights

open_clip: Any = clip.open_clip  # imported there, after torchvision was mended
TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CUSTOM = TINY | {"custom_text": True}  # the text tower is a part of its own then
PHOTO = "a photo of {}."


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path) -> Iterator[None]:
    """Two small models beside open_clip's own."""
    before = dict(open_clip.factory._MODEL_CONFIGS)
    for name, model_config in {"tiny": TINY, "tiny-custom": CUSTOM}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(model_config), encoding="utf-8")
        open_clip.add_model_config(tmp_path / f"{name}.json")
    clip.models.cache_clear()
    yield
    open_clip.factory._MODEL_CONFIGS = before
    del open_clip.factory._MODEL_CONFIG_PATHS[1:]
    clip.models.cache_clear()


def saved(model: str, path: Path, *, half: bool = False) -> CriticFile:
    """A randomly initialised open_clip model in a file."""
    torch.manual_seed(0)
    net: Any = open_clip.create_model(model, pretrained_text=False)
    tensors = {name: value.half() if half else value for name, value in net.state_dict().items()}
    save_file(tensors, path)
    return CriticFile(model, str(path), hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def file(tmp_path: Path) -> CriticFile:
    return saved("tiny", tmp_path / "tiny.safetensors")


def test_sentences_have_the_token_numbers_of_clip() -> None:
    tokens = Tokeniser(12)(["a photo of dog."])[0]
    assert tokens.tolist() == [49406, 320, 1125, 539, 1929, 269, 49407, 0, 0, 0, 0, 0]


def test_a_prompt_ends_in_an_english_full_stop_or_in_that_of_the_authors() -> None:
    for official, stop in ((False, 269), (True, 13)):
        row, first = Tokeniser(12).with_prompt(PHOTO, 3, official=official)
        assert first == 4 and row[0, :4].tolist() == [49406, 320, 1125, 539]
        assert row[0, 7:].tolist() == [stop, 49407, 0, 0, 0]


def test_a_small_vocabulary_keeps_the_order_of_the_large_one() -> None:
    sentences = ["a photo of dog.", "a photo of tv monitor."]
    large, small = Tokeniser(12), Tokeniser(12, sentences)
    assert small.vocabulary_size == len(large(sentences).unique())
    assert torch.equal(large(sentences).argsort(dim=1, stable=True), small(sentences).argsort(dim=1, stable=True))
    assert small(sentences).max() == small.end == small.vocabulary_size - 1  # where a text is read


def test_a_sentence_that_does_not_fit_is_refused_rather_than_cut() -> None:
    with pytest.raises(ValueError, match=r"has 13 tokens, but the critic reads 12.*the recipe"):
        Tokeniser(12)(["a photo of a photo of a photo of a."])
    with pytest.raises(ValueError, match=r"has 18 tokens.*prompt\.length"):
        Tokeniser(12).with_prompt(PHOTO, 12, official=False)


@pytest.mark.parametrize("model", ["tiny", "tiny-custom"])
def test_a_prompt_of_a_words_own_embedding_is_that_word(model: str, tmp_path: Path) -> None:
    critic = read_critic(saved(model, tmp_path / "file.safetensors"), "clip")
    with torch.no_grad():
        word = critic.token_embedding(torch.tensor([critic.tokeniser.numbers("tv monitor")]))
        prompt = critic.embed_prompts(word, PHOTO)
    torch.testing.assert_close(prompt, critic.embed_texts(["a photo of tv monitor."]))


def test_a_phrase_is_repeated_to_any_length(file: CriticFile) -> None:
    critic = read_critic(file, "clip")
    vectors = critic.phrase_vectors("tv monitor", 3)
    tokens = critic.token_embedding(torch.tensor(critic.tokeniser.numbers("tv monitor")))
    assert torch.equal(vectors[:2], tokens) and torch.equal(vectors[2], tokens[0]) and not vectors.requires_grad


def test_prompts_have_a_gradient_and_the_weights_have_none(file: CriticFile) -> None:
    critic = read_critic(file, "clip")
    prompts = torch.randn(2, 5, 32, requires_grad=True)
    masks = torch.rand(2, 64, 64, requires_grad=True)
    images = critic.embed_images(critic.prepare(torch.rand(2, 3, 64, 64)) * masks[:, None])
    (critic.embed_prompts(prompts, PHOTO) * images).sum().backward()
    assert prompts.grad is not None and prompts.grad.abs().sum() > 0
    assert masks.grad is not None and masks.grad.abs().sum() > 0
    assert not critic.training and all(parameter.grad is None for parameter in critic.parameters())


def test_a_mean_of_sentences_is_a_unit_vector_again(file: CriticFile) -> None:
    critic = read_critic(file, "clip")
    means = critic.mean_texts([["a photo of dog."], ["a photo of person.", "a photo of player."]])
    torch.testing.assert_close(means[0], critic.embed_texts(["a photo of dog."])[0])
    torch.testing.assert_close(means.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("normalisation", "mean"), [("clip", (0.48145466, 0.4578275, 0.40821073)), ("imagenet", weights.IMAGENET_MEAN)]
)
def test_the_mean_colour_is_zero_and_any_size_is_brought_to_the_critics(
    file: CriticFile, normalisation: clip.Normalisation, mean: tuple[float, ...]
) -> None:
    critic = read_critic(file, normalisation)
    plain = torch.tensor(mean).view(1, 3, 1, 1).expand(1, 3, 50, 70)
    prepared = critic.prepare(plain)
    assert prepared.shape == (1, 3, 64, 64) and prepared.abs().max() < 1e-5


def test_half_precision_and_pt_files_can_be_read(file: CriticFile, tmp_path: Path) -> None:
    texts = read_critic(file, "clip").embed_texts(["a photo of dog."])
    half = read_critic(saved("tiny", tmp_path / "half.safetensors", half=True), "clip").embed_texts(["a photo of dog."])
    torch.testing.assert_close(half, texts, atol=1e-2, rtol=0)
    path = tmp_path / "tiny.pt"
    torch.save({"state_dict": weights.read_weights(Path(file.weights))}, path)
    again = CriticFile("tiny", str(path), hashlib.sha256(path.read_bytes()).hexdigest())
    torch.testing.assert_close(read_critic(again, "clip").embed_texts(["a photo of dog."]), texts)


def test_reading_a_critic_leaves_the_random_generator_alone_and_happens_once(file: CriticFile) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = read_critic(file, "clip")
    assert torch.equal(torch.rand(1), expected) and read_critic(file, "clip") is first


def test_a_wrong_file_is_an_error_that_names_the_key_to_edit(file: CriticFile, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors is missing: .*model\.critic of the recipe"):
        read_critic(CriticFile("tiny", str(tmp_path / "gone.safetensors"), file.sha256), "clip")
    with pytest.raises(ValueError, match=rf"has sha256 {file.sha256}, not 0{{64}}: .*model\.critic of the recipe"):
        read_critic(CriticFile("tiny", file.weights, "0" * 64), "clip")
    with pytest.raises(
        ValueError, match=r"as open_clip's tiny-custom does not fit: text\.\S+ is missing.*name the model.*the recipe"
    ):
        read_critic(CriticFile("tiny-custom", file.weights, file.sha256), "clip")


def test_a_pickled_program_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.save({"model": Path}, path)
    with pytest.raises(ValueError, match=r"program\.pt cannot be read.*without pickled code.*safetensors.*the recipe"):
        read_critic(CriticFile("tiny", str(path), hashlib.sha256(path.read_bytes()).hexdigest()), "clip")


def test_an_unknown_model_is_an_error_that_names_similar_ones() -> None:
    good: dict[str, Any] = {"model": "ViT-B-32", "weights": "w.safetensors", "sha256": "0" * 64}
    assert config.parse(CriticFile, good, "critic").model == "ViT-B-32"
    with pytest.raises(config.ParamsError, match=r"(?s)no model 'ViT-B-33'.*near it: .*ViT-B-32.*params\.yaml"):
        config.parse(CriticFile, good | {"model": "ViT-B-33"}, "critic")
    with pytest.raises(config.ParamsError, match=r"no model 'ViT-B-16-SigLIP'"):  # its tokeniser lies on a hub
        config.parse(CriticFile, good | {"model": "ViT-B-16-SigLIP"}, "critic")
    with pytest.raises(config.ParamsError, match=r"sha256 'abc' is none: .*64 hexadecimal digits"):
        config.parse(CriticFile, good | {"sha256": "abc"}, "critic")


def test_a_cached_tensor_is_computed_again_after_its_weights_were_written() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    cached, calls = CachedTensor(), []

    def compute() -> torch.Tensor:
        calls.append(1)
        return weight * 2

    for _ in range(3):
        cached([weight], compute)
    assert len(calls) == 1
    weight.grad = torch.ones(3)
    torch.optim.AdamW([weight], lr=0.1, foreach=True).step()
    assert torch.equal(cached([weight], compute), weight * 2) and len(calls) == 2
    torch.nn.ParameterList([weight]).load_state_dict({"0": torch.zeros(3)})
    assert not cached([weight], compute).any() and len(calls) == 3


def test_a_vit_b_32_can_be_read_and_embeds_images_and_prompts(tmp_path: Path) -> None:
    """The model of the paper, with random weights in half precision: 300 MB."""
    file = saved("ViT-B-32", tmp_path / "clip.safetensors", half=True)
    critic = read_critic(file, "imagenet")
    assert critic.side == 224 and critic.tokeniser.length == 77 and clip.text_width("ViT-B-32") == 512
    with torch.no_grad():
        images = critic.embed_images(critic.prepare(torch.rand(2, 3, 64, 96)))
        prompts = critic.embed_prompts(torch.rand(2, 30, 512), PHOTO, official=True)
    assert images.shape == prompts.shape == (2, 512)
    with pytest.raises(ValueError, match=r"as open_clip's ViT-B-16 does not fit: .*has shape"):
        read_critic(CriticFile("ViT-B-16", file.weights, file.sha256), "clip")
    read_critic(saved("tiny", tmp_path / "tiny.safetensors"), "clip")  # one critic is cached: this releases the large one
