"""`export-model` and `segment --onnx`: torch's masks for any size, a file that explains itself, and no torch to run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image

from pipeline.core import config, plugins
from pipeline.core.labels import LabelSpace
from pipeline.jobs import onnx_graph, onnx_model, segment
from pipeline.jobs.onnx_model import OnnxSegmenter
from stages import export_model as command
from stages import segment_folder as segment_command
from tests.test_segment import SETTINGS, Leftish, chosen, job, picture, project
from tests.test_segmenter_vit import SCHEDULE
from tests.toys import PROJECT, smp_model, toy_recipe

__all__ = ["project"]  # the fixture: a folder with params.yaml, records, images and an untrained segmenter
LABELS = LabelSpace(("disc", "square"))
MODELS: dict[str, Callable[[], dict[str, Any]]] = {
    "vit": lambda: toy_recipe("cam")["retrain"]["model"],
    "mit": lambda: toy_recipe("afa")["retrain"]["model"],
    "resnet": lambda: toy_recipe("ppl")["retrain"]["model"],
    "smp": smp_model,
}


@pytest.fixture
def ready(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with artifacts/cam/segmenter.safetensors, as export-model looks for it."""
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    (project / "artifacts" / "cam").mkdir(parents=True)
    (project / "segmenter.safetensors").rename(project / "artifacts" / "cam" / "segmenter.safetensors")
    return project


def exported(*words: str) -> Result:
    return CliRunner().invoke(command.main, ["cam", "--onnx", "models/cam.onnx", "--records", "records.h5", *words])


def segmented(*words: str) -> Result:
    return CliRunner().invoke(segment_command.main, [*words, "--images", "raw", "--out", "out"])


def masks_in(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "masks").iterdir())}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_segmenter_becomes_a_graph_that_takes_any_number_and_size_of_images(name: str, tmp_path: Path) -> None:
    module = plugins.load("segmenters", name)
    torch.manual_seed(0)
    params = config.parse(module.Params, MODELS[name](), "model")
    segmenter = module.Segmenter(LABELS, params, SCHEDULE, plugins.load("nn", name)).eval()
    options = config.parse(module.Options, {"block_weights": None} if name == "vit" else {}, "options")
    onnx.save(onnx_graph.model_of(segmenter, options), tmp_path / "model.onnx")
    opened = onnx_model.session(tmp_path / "model.onnx", b"")
    for size in ((1, 1, 1), (2, 32, 64), (3, 35, 70)):
        images = torch.rand(size[0], 3, *size[1:])
        with torch.no_grad():
            expected = segmenter.segment(images, options).numpy()
        np.testing.assert_allclose(opened.run(None, {"images": images.numpy()})[0], expected, atol=2e-4, rtol=2e-4)


def test_the_exported_file_explains_itself_and_agrees_with_torch(ready: Path) -> None:
    result = exported("--int8")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("models/")]
    assert "fp32; 100.0000% of the pixels of 5 photographs" in lines[0] or "fp32; 99.9" in lines[0]
    assert lines[1].startswith("models/cam.int8.onnx") and "int8, dynamic quantisation" in lines[1]
    assert sorted(path.name for path in Path("models").iterdir()) == ["cam.int8.onnx", "cam.onnx"]
    properties = {prop.key: prop.value for prop in onnx.load("models/cam.onnx").metadata_props}
    assert json.loads(properties["names"]) == ["disc", "square"]
    classes = json.loads(properties["classes"])
    assert [row["value"] for row in classes] == [0, 1, 2, 255] and classes[1]["color"] == "#800000"
    assert properties["background"] == "0" and properties["ignore"] == "255" and properties["supervision"] == "tags"
    assert json.loads(properties["segment"])["window"] == SETTINGS["window"]
    assert OnnxSegmenter.read(Path("models/cam.onnx")).metadata.segment == chosen(
        flip=True, scales=[0.75, 1.5], crf=json.loads(properties["segment"])["crf"]
    )
    assert OnnxSegmenter.read(Path("models/cam.int8.onnx")).metadata.quantisation == "dynamic"


def test_segment_runs_the_file_without_torch_and_without_a_project_and_masks_are_torchs(ready: Path) -> None:
    recipe = ready / "recipes" / "cam.yaml"
    text = recipe.read_text(encoding="utf-8")
    start = text.index("  crf:", text.index("\nsegment:"))
    end = text.index("  images_per_part", start)
    recipe.write_text(text[:start] + "  crf: null\n" + text[end:], encoding="utf-8")  # an ONNX file has none
    assert exported().exit_code == 0
    assert segmented("cam").exit_code == 0
    by_torch = masks_in(ready / "out")
    other = ready / "elsewhere"
    other.mkdir()
    script = (
        "import sys; from stages.segment_folder import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert not {'torch', 'torchvision', 'timm', 'onnx'} & set(sys.modules)"
    )
    words = ["--onnx", str(ready / "models" / "cam.onnx"), "--images", str(ready / "raw"), "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words], cwd=other, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_onnx = masks_in(other / "out")
    assert by_onnx.keys() == by_torch.keys()
    equal = sum(int((by_onnx[name] == mask).sum()) for name, mask in by_torch.items())
    assert equal >= 0.999 * sum(mask.size for mask in by_torch.values())


def test_a_crf_is_left_out_with_a_word_and_a_rerun_says_what_was_there(ready: Path) -> None:
    assert exported().exit_code == 0
    first = segmented("--onnx", "models/cam.onnx")
    assert first.exit_code == 0 and "CRF, which is no part of an ONNX model" in first.output
    again = segmented("--onnx", "models/cam.onnx")
    assert "0 masks and overlays written to out; 5 masks were there already (use --overwrite)" in again.output


def test_a_graph_that_differs_from_torch_is_not_written(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = onnx_graph.with_padding

    def wrong(model: Any, *padding: Any) -> Any:
        for tensor in model.graph.initializer:
            if len(tensor.dims) == 2:
                tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
        return right(model, *padding)

    monkeypatch.setattr(onnx_graph, "with_padding", wrong)
    result = exported()
    assert result.exit_code == 1 and "no file was written" in result.output
    assert not list((ready / "models").iterdir())


def test_wrong_files_and_arguments_are_reported(ready: Path) -> None:
    assert "must end in .onnx" in CliRunner().invoke(command.main, ["cam", "--onnx", "model.pt"]).output
    missing = CliRunner().invoke(command.main, ["cam", "--onnx", "a.onnx", "--records", "no.h5"])
    assert "give --check-images FOLDER" in missing.output
    (ready / "empty").mkdir()
    assert "holds no image" in exported("--check-images", "empty").output
    (ready / "text.onnx").write_text("no model")
    assert "is no ONNX model" in segmented("--onnx", "text.onnx").output
    assert "no.onnx is missing; write it by `tag2mask export-model" in segmented("--onnx", "no.onnx").output
    node = onnx.helper.make_node("Identity", ["images"], ["logits"])
    shapes = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in ("images", "logits")]
    graph = onnx.helper.make_graph([node], "other", shapes[:1], shapes[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), "other.onnx")
    assert "is no model of `tag2mask export-model`" in segmented("--onnx", "other.onnx").output
    assert segmented().exit_code == segmented("cam", "--onnx", "text.onnx").exit_code == 2
    assert segmented("--onnx", "text.onnx", "--segmenter", "x").exit_code == 2


def test_check_images_are_a_folder_of_any_photographs(ready: Path) -> None:
    for number in range(2):
        (ready / "photos").mkdir(exist_ok=True)
        Image.fromarray(picture(20, 30 + number)).save(ready / "photos" / f"{number}.png")
    result = exported("--check-images", "photos", "--records", "no.h5")
    assert result.exit_code == 0 and "of the pixels of 2 photographs" in result.output


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.75]])
def test_windows_scales_and_mirror_images_are_those_of_the_stage(scales: list[float]) -> None:
    settings = chosen(scales=scales, flip=True, window_stride=12)
    model, image = Leftish(), np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    expected = segment.probabilities(image, model, job(settings), planes_count=3)
    made = onnx_model.probabilities(
        image, lambda batch: model.segment(torch.from_numpy(np.ascontiguousarray(batch))).numpy(), settings, planes_count=3
    )
    np.testing.assert_allclose(made, expected, atol=1e-5)


@given(st.tuples(*[st.integers(1, 12)] * 4))
@hypothesis(max_examples=40, deadline=None)
def test_planes_are_resized_as_torch_does(sizes: tuple[int, ...]) -> None:
    planes = np.random.default_rng(0).random((2, *sizes[:2]), dtype=np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(planes)[None], sizes[2:], mode="bilinear")[0].numpy()
    np.testing.assert_allclose(onnx_model.interpolated(planes, (sizes[2], sizes[3])), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(14, 14), (1, 3), (20, 9), (40, 40)])
def test_position_embeddings_are_resampled_as_timm_does(size: tuple[int, int]) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    embeddings = torch.randn(1, 1 + 14 * 14, 8)
    expected = resample_abs_pos_embed(embeddings, list(size), [14, 14], num_prefix_tokens=1)
    torch.testing.assert_close(onnx_graph.resampled(embeddings, size, (14, 14), 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("output_size", [1, 3, (6, 2)])
def test_maps_are_pooled_as_torch_does(output_size: Any) -> None:
    maps = torch.randn(2, 3, 5, 13)
    expected = torch.nn.functional.adaptive_avg_pool2d(maps, output_size)
    torch.testing.assert_close(onnx_graph.pooled(maps, output_size), expected)
