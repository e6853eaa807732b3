"""Segments from a network: U²-Net on photographs, ONNX files made here, what is cut into segments, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refine_case as case
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline.core import config, refiner_state, store
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes
from pipeline.jobs import check
from pipeline.refiners.segments import network, reader, refiner
from pipeline.refiners.segments.onnx_network import OnnxNetwork
from pipeline.refiners.segments.u2net import U2Net
from tests.segments_case import masks_of, rle, write_lines
from tests.shared_data import shared
from tests.toys import Toy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SUPERPIXELS = {"source": "felzenszwalb", "scale": 50.0, "sigma": 0.8, "min_size": 8}
FED = {
    "size": None, "divide_by": "255", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "proposals": "saliency",
    "values": "as_is",
}  # fmt: skip
DIGEST = "0" * 64


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def channels(path: Path, taken: Sequence[int], factor: float = 1.0) -> Path:
    """An ONNX network whose maps are channels of its input times a factor."""
    weight = np.zeros((len(taken), 3, 1, 1), np.float32)
    for row, channel in enumerate(taken):
        weight[row, channel] = factor
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["image", "weight"], ["maps"])],
        "channels",
        [onnx.helper.make_tensor_value_info("image", float32, [1, 3, "h", "w"])],
        [onnx.helper.make_tensor_value_info("maps", float32, [1, len(taken), "h", "w"])],
        [onnx.numpy_helper.from_array(weight, "weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def section(path: Path, **changes: Any) -> dict[str, Any]:
    """fit_refiner.segments of a network's file."""
    fed = FED if path.suffix == ".onnx" else None
    return {
        "source": "network", "path": str(path), "sha256": sha256(path) if path.is_file() else DIGEST,
        "supervision": "saliency (drawn masks)", "onnx": fed, "threshold": 0.5, "superpixels": None,
    } | changes  # fmt: skip


def masks_section(path: Path) -> dict[str, Any]:
    return section(path, onnx=FED | {"proposals": "masks"})


def fit_params(segments: dict[str, Any]) -> refiner.FitParams:
    return config.parse(
        refiner.FitParams, {"threshold": {"rule": "fixed", "value": 0.4}, "segments": segments}, "fit_refiner"
    )


def made(segments: dict[str, Any], maps: Sequence[ImageMaps] = ()) -> refiner.Refiner:
    state = refiner.fit(fit_params(segments), iter(maps), lambda at: np.zeros(0))
    return refiner.Refiner(
        config.parse(refiner.Params, {"normalise": "minmax", "power": 1.0, "uncovered": "scores"}, ""), state
    )


def u2netp(path: Path) -> Path:
    torch.manual_seed(0)
    save_file({name: value.numpy() for name, value in U2Net("u2netp").state_dict().items()}, path)
    return path


# ---- what networks say ----


def test_u2net_finds_the_foreground_of_photographs() -> None:
    weights, root = shared("weights", "u2netp.safetensors"), shared("data", "voc6")
    ids = (root / "ImageSets" / "Segmentation" / "val.txt").read_text().split()[::33][:6]
    source = fit_params(section(weights)).segments
    assert isinstance(source, network.SegmentNetwork)
    saliency, overlaps = network.network_of(source, network.state_of(source)), []
    for image_id in ids:
        image = np.array(Image.open(root / "JPEGImages" / f"{image_id}.jpg").convert("RGB"))
        truth = np.array(Image.open(root / "SegmentationClass" / f"{image_id}.png"))
        inside, valid = planes.upsample(saliency(image), truth.shape)[0] >= 0.5, truth != 255
        overlaps.append((inside & (truth > 0)).sum() / ((inside | (truth > 0)) & valid).sum())
    assert np.mean(overlaps) > 0.6  # on 48 images 0.75; of noise, or of layers in another order, 0.2


@pytest.mark.parametrize("architecture", ["u2net", "u2netp"])
def test_u2net_gives_a_map_between_0_and_1_in_the_size_of_its_input(architecture: str) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        maps = U2Net(architecture).eval()(torch.rand(2, 3, 70, 33))
    assert maps.shape == (2, 1, 70, 33) and maps.min() >= 0 and maps.max() <= 1


@pytest.mark.parametrize(
    ("fed", "factor", "expected"),
    [
        ({}, 1.0, 100 / 255),
        ({"divide_by": "maximum"}, 1.0, 0.5),
        ({"mean": [0.1, 0.0, 0.0], "std": [2.0, 1.0, 1.0]}, 1.0, (100 / 255 - 0.1) / 2),
        ({"values": "sigmoid"}, -1.0, 1 / (1 + np.exp(100 / 255))),
        ({"values": "minmax"}, 7.0, 0.0),
    ],
)
def test_an_onnx_network_is_fed_and_read_as_the_recipe_says(
    tmp_path: Path, fed: dict[str, Any], factor: float, expected: float
) -> None:
    source = fit_params(section(channels(tmp_path / "a.onnx", [0], factor), onnx=FED | fed)).segments
    assert isinstance(source, network.SegmentNetwork)
    image = np.full((6, 9, 3), 100, np.uint8)
    image[0, 0] = 200
    maps = network.network_of(source, network.state_of(source))(image)
    assert maps.shape == (1, 6, 9) and maps[0, 3, 3] == pytest.approx(expected, abs=1e-6)


def test_an_image_is_resized_to_what_an_onnx_network_takes(tmp_path: Path) -> None:
    source = fit_params(section(channels(tmp_path / "a.onnx", [1]), onnx=FED | {"size": 8})).segments
    assert isinstance(source, network.SegmentNetwork)
    assert network.network_of(source, network.state_of(source))(np.zeros((30, 50, 3), np.uint8)).shape == (1, 8, 8)


# ---- from maps to segments ----


@hypothesis_settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 999))
def test_a_segment_lies_in_one_superpixel_and_on_one_side_of_the_border(size: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside, parts = rng.random(size) < 0.5, rng.integers(0, 3, size)
    segment = network.cut(inside, parts)
    assert sorted(np.unique(segment)) == list(range(segment.max() + 1))
    for number in range(segment.max() + 1):
        here = segment == number
        assert len(np.unique(inside[here])) == len(np.unique(parts[here])) == 1
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):  # neighbours that are alike share a segment
        alike = (inside[a] == inside[b]) & (parts[a] == parts[b])
        assert (segment[a] == segment[b])[alike].all()


@hypothesis_settings(max_examples=40, deadline=None)
@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), seed=st.integers(0, 999))
def test_run_lengths_of_a_mask_are_those_of_coco(size: tuple[int, int], seed: int) -> None:
    for mask in masks_of(np.random.default_rng(seed), size, 3):
        expected = reader.run_lengths(rle(mask)["segmentation"]["counts"], mask.size)
        assert network.run_lengths(mask).tolist() == expected.tolist()


def test_a_class_fills_the_salient_object_that_its_score_map_touches(tmp_path: Path) -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image[4:16, 5:25, 0] = 255
    score = np.zeros((1, 20, 30), np.float32)
    score[0, 6:12, 10:16] = 1
    maps = ImageMaps(np.array([3]), score, (20, 30))
    found = made(section(channels(tmp_path / "a.onnx", [0])))(image, maps, 0.4)
    np.testing.assert_array_equal(planes.labels_of(found, maps.classes), np.where(image[..., 0] > 0, 4, 0))


def test_masks_of_a_network_do_what_the_same_masks_in_a_file_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    image = (255 * (rng.random((12, 15, 3)) < [0.3, 0.6, 0.1])).astype(np.uint8)
    maps = ImageMaps(np.array([0, 2]), rng.random((2, 12, 15), np.float32), (12, 15), id="a")
    file = write_lines(tmp_path / "all.jsonl", {"a": [rle(image[..., channel] > 0) for channel in range(3)]})
    one, two = (
        made(source, [maps])(image, maps, 0.4) for source in (masks_section(channels(tmp_path / "a.onnx", [0, 1, 2])), file)
    )
    np.testing.assert_array_equal(one, two)


# ---- in the stages ----


def test_the_stages_write_the_same_bytes_for_any_workers_and_need_no_weights_after_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    model, outs = tmp_path / "a.onnx", []
    for workers in ("1", "2"):
        channels(model, [0])
        case.build(
            tmp_path / workers, refiner="segments", disagree_at=[0.2, 2.0], segments=section(model, superpixels=SUPERPIXELS)
        )
        monkeypatch.chdir(tmp_path / workers)
        monkeypatch.setenv("TAG2MASK_WORKERS", workers)
        case.run_well("fit_refiner")
        model.unlink()
        case.run_well("refine")
        outs.append(case.contents(Path("out")))
    assert outs[0] == outs[1]
    assert any(fields["label"].any() for _, fields in store.Store(Path("out/refined"), store.REFINED))
    assert refiner_state.supervision(Path("out/refiner.safetensors")) == "tags + saliency (drawn masks)"


def test_u2nets_weights_travel_in_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    weights = u2netp(tmp_path / "u2netp.safetensors")
    case.build(tmp_path / "run", refiner="segments", segments=section(weights))
    monkeypatch.chdir(tmp_path / "run")
    case.run_well("fit_refiner")
    state = Path("out/refiner.safetensors")
    tensors = refiner_state.network_tensors(refiner_state.read(state, "segments"))
    assert refiner_state.has_network(state) and tensors.keys() == load_file(weights).keys()
    weights.unlink()
    case.run_well("refine")


def test_the_network_runs_once_per_image_however_many_thresholds_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, run = [], OnnxNetwork.__call__
    monkeypatch.setattr(OnnxNetwork, "__call__", lambda self, image: calls.append(image.shape) or run(self, image))
    refine = made(section(channels(tmp_path / "a.onnx", [0])))
    for seed in range(2):
        image = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        maps = ImageMaps(np.array([0]), np.random.default_rng(seed).random((1, 5, 7), np.float32), (5, 7))
        for threshold in (0.2, 0.4, 0.8):
            refine(image, maps, threshold)
    assert len(calls) == 2


def test_superpixels_alone_learn_from_tags_and_a_file_of_segments_says_so(tmp_path: Path) -> None:
    assert refiner.supervision(fit_params(SUPERPIXELS)) is None
    assert refiner.supervision(fit_params(write_lines(tmp_path / "all.jsonl", {}))) == "segments from a file"


# ---- what is refused ----


def test_files_that_are_no_such_network_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    whole = u2netp(tmp_path / "u2netp.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({"stage1.rebnconv1.weight": np.zeros(3)}))
    save_file({"patch_embed.proj.weight": np.zeros((2, 3, 4, 4), np.float32)}, tmp_path / "vit.safetensors")
    tensors = load_file(tmp_path / "u2netp.safetensors")
    save_file({name: value for name, value in tensors.items() if name != "side3.bias"}, tmp_path / "short.safetensors")
    (tmp_path / "noise.onnx").write_bytes(b"\x08\x07noise")
    wrong = {
        "cut.safetensors": "is no safetensors file", "pickle.safetensors": "is no safetensors file",
        "vit.safetensors": "weights check", "short.safetensors": "side3.bias is missing", "noise.onnx": "no ONNX file",
        "nowhere.safetensors": "there is no file",
    }  # fmt: skip
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            refiner.check(fit_params(section(tmp_path / name)))
    with pytest.raises(ValueError, match=sha256(tmp_path / "u2netp.safetensors")):
        refiner.check(fit_params(section(tmp_path / "u2netp.safetensors", sha256=DIGEST)))
    refiner.check(fit_params(section(tmp_path / "u2netp.safetensors")))


def test_an_output_that_is_not_what_the_recipe_says_is_named_with_the_cure(tmp_path: Path) -> None:
    image, maps = np.full((4, 4, 3), 255, np.uint8), ImageMaps(np.array([0]), np.ones((1, 4, 4), np.float32), (4, 4))
    with pytest.raises(ValueError, match=r"first output is \[1, 2, 4, 4\], allowed is \[1,1,h,w\]"):
        made(section(channels(tmp_path / "two.onnx", [0, 1])))(image, maps, 0.4)
    with pytest.raises(ValueError, match=r"from 3 to 3, not from 0 to 1; set onnx\.values to sigmoid"):
        made(section(channels(tmp_path / "three.onnx", [0], 3.0)))(image, maps, 0.4)
    with pytest.raises(ValueError, match="not finite"):
        made(section(channels(tmp_path / "nan.onnx", [0], np.nan)))(image, maps, 0.4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "a.pth"}, "path: got 'a.pth', allowed is a .safetensors or an .onnx file"),
        ({"sha256": "3f0c"}, "allowed are 64 hexadecimal digits"),
        ({"supervision": " "}, "supervision: got '', allowed is what the network learned from"),
        ({"onnx": FED}, "null for a .safetensors file"),
        ({"path": "a.onnx"}, "onnx: allowed is a mapping for an .onnx file"),
        ({"path": "a.onnx", "onnx": FED | {"proposals": "masks"}, "superpixels": SUPERPIXELS}, "superpixels: got a mapping"),
        ({"threshold": 1.5}, r"fit_refiner.segments.threshold: got 1.5, allowed is a number >= 0 and <= 1"),
        ({"superpixels": {"source": "quickshift"}}, "superpixels"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(config.ParamsError, match=words):
        fit_params(section(Path("a.safetensors")) | changes)


def test_check_lists_a_network_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy = Toy(tmp_path / "raw")
    toy.params["methods"]["cam"]["refiner"] = "segments"
    toy.recipes["cam"]["fit_refiner"]["segments"] = section(channels(tmp_path / "a.onnx", [0]))
    toy.recipes["cam"]["refine"]["options"] = case.SEGMENTS
    toy.write(tmp_path)
    assert check.problems() == []
    (tmp_path / "a.onnx").unlink()
    assert [problem for problem in check.problems() if "segments.path: there is no file" in problem]


def test_a_state_keeps_the_settings_that_it_was_fitted_with_and_is_of_tags_unless_it_says_more(tmp_path: Path) -> None:
    refiner_state.write(tmp_path / "a", "crf", {"threshold": np.float32([0.4])}, json.dumps({"b": 1}))
    assert refiner_state.fitted_params(tmp_path / "a") == {"b": 1} and refiner_state.supervision(tmp_path / "a") == "tags"
