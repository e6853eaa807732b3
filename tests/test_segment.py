"""Stage segment: windows, scales and mirror images of made-up segmenters, and the same bytes for any number of processes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline import runtime
from pipeline.core import records, store
from pipeline.core.config import ParamsError, parse
from pipeline.core.labels import LabelSpace
from pipeline.core.sections import Segment
from pipeline.crf import CrfSettings
from pipeline.jobs import segment, windows
from pipeline.segmenters.vit.segmenter import Options, Segmenter
from pipeline.training import checkpoint
from stages import segment as stage
from tests.test_segmenter_vit import MODEL, SCHEDULE, small
from tests.toys import Toy

SETTINGS: dict[str, Any] = {
    "scales": [1.0], "flip": False, "short_side": None, "window": 16, "window_stride": 12, "precision": "fp32", "crf": None,
    "images_per_part": 2, "compression": "gzip", "options": {"block_weights": None},
}  # fmt: skip
CRF = CrfSettings(
    iterations=2, gaussian_sxy=3, gaussian_compat=3, bilateral_sxy=20, bilateral_srgb=5, bilateral_compat=4
)  # fmt: skip
LABELS = LabelSpace(("disc", "square"))


def chosen(**changes: Any) -> Segment:
    return parse(Segment, SETTINGS | changes, "segment")


def job(settings: Segment | None = None, **changes: Any) -> segment.Job:
    settings = chosen(**changes) if settings is None else settings
    return segment.Job(
        segmenter="vit", weights=Path(), settings=settings, crf=None, options=Options(None), root=Path(), labels=LABELS,
        parts=1, params_digest="", out=Path(), device="cpu",
    )  # fmt: skip


class Colours:
    """A segmenter that reads the class off each pixel: red is disc, blue is square, the rest background."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def segment(self, images: Tensor, options: Any = None) -> Tensor:
        self.shapes.append(tuple(images.shape))
        red, green, blue = images.unbind(1)
        return 8 * torch.stack([green, red, blue], dim=1)


class Leftish:
    """A segmenter whose logits depend on the neighbourhood and on the place in the window, so that views differ."""

    def segment(self, images: Tensor, options: Any = None) -> Tensor:
        ramp = torch.linspace(0, 1, images.shape[-1]).expand_as(images)
        return F.avg_pool2d(images, 3, stride=1, padding=1) * 5 + ramp * images.flip(1)


def picture(h: int, w: int) -> np.ndarray:
    image = np.zeros((h, w, 3), np.uint8)
    image[..., 1] = 255
    image[: h // 2, : w // 2] = (255, 0, 0)
    image[h // 2 :, 2 * w // 3 :] = (0, 0, 255)
    return image


def truth_of(image: np.ndarray) -> np.ndarray:
    return np.array([1, 0, 2], np.uint8)[image.argmax(axis=2)]


@given(length=st.integers(1, 300), window=st.integers(1, 100), stride=st.integers(1, 100))
def test_windows_cover_each_pixel_and_stay_inside(length: int, window: int, stride: int) -> None:
    window = min(window, length)
    found = windows.starts(length, window, min(stride, window))
    seen = np.zeros(length, bool)
    for start in found:
        assert 0 <= start <= length - window
        seen[start : start + window] = True
    assert seen.all()
    assert found == sorted(set(found)) and found[-1] == length - window


@hypothesis(max_examples=30, deadline=None)
@given(
    h=st.integers(1, 60), w=st.integers(1, 60), window=st.integers(1, 40), share=st.floats(0.1, 1), scale=st.floats(0.3, 2)
)  # fmt: skip
def test_a_constant_image_gives_a_constant_prediction(h: int, w: int, window: int, share: float, scale: float) -> None:
    image = np.full((h, w, 3), (51, 102, 204), np.uint8)
    some = chosen(scales=[scale], flip=True, window=window, window_stride=max(1, int(window * share)))
    found = segment.probabilities(image, Colours(), job(some), planes_count=3)
    wanted = (8 * torch.tensor([102, 51, 204]) / 255).softmax(0).numpy()
    assert found.shape == (3, h, w)
    assert np.abs(found - wanted[:, None, None]).max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (15, 16), (16, 16), (37, 53)])
def test_each_pixel_gets_its_own_class_at_any_size(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = segment.segment_one(image, Colours(), job(flip=True))
    assert found["label"].dtype == found["confidence"].dtype == np.uint8
    assert (found["label"] == truth_of(image)).all()
    assert (found["confidence"] > 250).all()


def test_views_smaller_than_the_window_are_not_enlarged() -> None:
    model = Colours()
    segment.probabilities(picture(7, 11), model, job(chosen()), planes_count=3)
    assert model.shapes == [(1, 3, 7, 11)]


def test_windows_go_through_the_model_in_batches() -> None:
    model = Colours()
    segment.probabilities(picture(40, 16), model, job(chosen(window_stride=4)), planes_count=3)
    assert model.shapes == [(4, 3, 16, 16), (3, 3, 16, 16)]


def test_the_short_side_is_scaled_to_the_param() -> None:
    model = Colours()
    some = chosen(short_side=32, scales=[0.5, 1.0], window=500)
    found = segment.probabilities(picture(64, 96), model, job(some), planes_count=3)
    assert model.shapes == [(1, 3, 16, 24), (1, 3, 32, 48)]
    assert found.shape == (3, 64, 96)


@pytest.mark.parametrize("scales", [[1.0], [0.5, 1.0, 1.5]])
def test_a_mirrored_image_gives_the_mirrored_prediction(scales: list[float]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    some = chosen(flip=True, scales=scales)
    plain = segment.probabilities(image, Leftish(), job(some), planes_count=3)
    mirrored = segment.probabilities(image[:, ::-1].copy(), Leftish(), job(some), planes_count=3)
    assert np.abs(plain - mirrored[..., ::-1]).max() < 1e-5
    alone = segment.probabilities(image, Leftish(), job(chosen(scales=scales)), planes_count=3)
    assert np.abs(plain - alone).max() > 1e-3  # the mirror image did count


def test_views_are_averaged_as_probabilities() -> None:
    image = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def found(scales: list[float]) -> np.ndarray:
        return segment.probabilities(image, Leftish(), job(chosen(scales=scales)), planes_count=3)

    both = found([1.0, 2.0])
    assert np.abs(both - (found([1.0]) + found([2.0])) / 2).max() < 1e-6
    assert np.abs(both.sum(axis=0) - 1).max() < 1e-5


def test_huge_images_are_computed_on_a_smaller_canvas_and_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "MOST_VALUES", 3 * 60 * 40)
    image, model = picture(240, 160), Colours()
    found = segment.segment_one(image, model, job(scales=[2.0], window=500))
    assert model.shapes == [(1, 3, 60, 40)]
    assert found["label"].shape == (240, 160)
    assert (found["label"] == truth_of(image)).mean() > 0.97


@given(h=st.integers(1, 20000), w=st.integers(1, 20000), planes=st.integers(2, 255))
def test_a_stack_of_planes_never_exceeds_its_bound(h: int, w: int, planes: int) -> None:
    bound = windows.bounded((h, w), planes)
    assert bound[0] * bound[1] * planes <= windows.MOST_VALUES
    assert bound == (h, w) or h * w * planes > windows.MOST_VALUES


def test_the_crf_sees_only_classes_that_win_somewhere() -> None:
    image = picture(24, 24)
    image[image[..., 2] == 255] = (0, 255, 0)  # no square
    found = segment.segment_one(image, Colours(), dataclasses.replace(job(), crf=CRF))
    assert (found["label"] == truth_of(image)).mean() > 0.95
    assert set(np.unique(found["label"])) == {0, 1}
    alone = segment.segment_one(np.full((9, 9, 3), (0, 255, 0), np.uint8), Colours(), dataclasses.replace(job(), crf=CRF))
    assert (alone["label"] == 0).all() and (alone["confidence"] == 255).all()


def test_half_precision_stays_close() -> None:
    model, image = small().eval(), picture(40, 40)
    exact = segment.probabilities(image, model, job(chosen()), planes_count=3)
    half = segment.probabilities(image, model, job(chosen(precision="bf16")), planes_count=3)
    assert half.dtype == np.float32
    assert 0 < np.abs(exact - half).max() < 0.05


def test_windows_that_would_miss_pixels_are_refused() -> None:
    with pytest.raises(ParamsError, match="window_stride: got 20, allowed is at most window"):
        chosen(window_stride=20)
    with pytest.raises(ParamsError, match="at least one scale"):
        chosen(scales=[])
    with pytest.raises(ParamsError, match=r"recipes/cam\.yaml: segment\.crf\.iterations"):
        segment.crf_of(Toy(Path("raw")).settings(), chosen(crf={"iterations": 0}))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with images of awkward sizes, records, params.yaml, a recipe and an untrained segmenter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").mkdir()
    found = []
    for number, (size, split) in enumerate(
        [((40, 33), "val"), ((1, 1), "val"), ((9, 64), "val"), ((20, 20), "train"), ((31, 8), "val")]
    ):
        path = tmp_path / "raw" / f"{number}.png"
        Image.fromarray(picture(*size)).save(path)
        found.append(
            records.ImageRecord(f"id {number}", path.name, size, split, None, hashlib.sha256(path.read_bytes()).digest())
        )
    records.write(tmp_path / "records.h5", records.Records(LABELS, tuple(found), ()))
    toy = Toy(tmp_path / "raw")
    toy.recipes["cam"]["segment"] = SETTINGS | {"flip": True, "scales": [0.75, 1.5], "crf": dataclasses.asdict(CRF)}
    toy.write(tmp_path)
    save(tmp_path / "segmenter.safetensors", small(), LABELS)
    yield tmp_path


def save(path: Path, model: Segmenter, labels: LabelSpace) -> None:
    augment = {"size": 32, "scale_min": 1.0, "scale_max": 1.0, "area_min": None, "flip": 0.0, "jitter": 0.0}
    augment |= {"rand_augment": None, "erase": 0.0}
    section = {
        "seed": 0, "precision": "fp32", "augment": augment, "schedule": dataclasses.asdict(SCHEDULE), "model": MODEL,
    }  # fmt: skip
    told = {"plugin": "vit", "labels": json.dumps(labels.names), "section": json.dumps(section)}
    checkpoint.save_tensors(path, model.state_dict(), told)


def run(out: str) -> Result:
    arguments = ["cam", "--records", "records.h5", "--segmenter", "segmenter.safetensors", "--predictions", out]
    return CliRunner().invoke(stage.main, arguments)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_and_three_processes_write_the_same_bytes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for workers in ("1", "3"):
        monkeypatch.setenv("TAG2MASK_WORKERS", workers)
        result = run(f"predictions-{workers}")
        assert result.exit_code == 0, result.output
    one, three = bytes_of(project / "predictions-1"), bytes_of(project / "predictions-3")
    assert one == three
    assert list(one) == ["part-00000.h5", "part-00001.h5"]
    found = store.Store(project / "predictions-1", store.PREDICTIONS)
    assert found.ids == ["id 0", "id 1", "id 2", "id 4"]  # val only
    assert found["id 0"]["label"].shape == (40, 33) and found["id 1"]["confidence"].shape == (1, 1)
    assert found.labels == LABELS


def test_decoding_ahead_crfs_in_processes_of_their_own_and_writing_behind_give_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    assert run("in-line").exit_code == 0
    real, decoders = segment.read_image, set()

    def decode(record: records.ImageRecord, root: Path) -> np.ndarray:
        decoders.add(threading.current_thread())
        return real(record, root)

    monkeypatch.setattr(segment, "read_image", decode)
    monkeypatch.setattr(runtime, "loaders", lambda device: 2)
    monkeypatch.setattr(runtime, "beside", lambda device: 2)
    result = run("side-by-side")
    assert result.exit_code == 0, result.output
    assert decoders and threading.current_thread() not in decoders
    assert bytes_of(project / "in-line") == bytes_of(project / "side-by-side")


def test_an_image_that_has_changed_is_named_by_the_stage_that_decodes_ahead(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.setattr(runtime, "loaders", lambda device: 2)
    (project / "raw" / "2.png").write_bytes(b"another")
    result = run("predictions")
    assert result.exit_code == 1
    assert "2.png has changed since prepare read it" in result.output
    assert not (project / "predictions").exists()


def test_parts_that_a_killed_run_finished_are_not_computed_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    real, seen = segment.segment_part, []

    def dying(item: Any, job: segment.Job) -> int:
        seen.append(item[0])
        if item[0] == 1 and len(seen) == 2:
            raise ValueError("killed")
        return real(item, job)

    monkeypatch.setattr(segment, "segment_part", dying)
    assert "killed" in run("predictions").output
    assert not (project / "predictions").exists()
    assert run("predictions").exit_code == 0
    assert seen == [0, 1, 1]
    assert run("again").exit_code == 0
    assert bytes_of(project / "predictions") == bytes_of(project / "again")
    assert not list((project / ".work").iterdir())


def test_no_val_image_gives_an_empty_store(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    records.write(project / "records.h5", records.Records(LABELS, (), ()))
    assert run("predictions").exit_code == 0
    assert len(store.Store(project / "predictions", store.PREDICTIONS)) == 0


def test_a_segmenter_of_other_classes_is_refused_before_any_work(project: Path) -> None:
    save(project / "segmenter.safetensors", small(), LabelSpace(("square", "disc")))
    result = run("predictions")
    assert result.exit_code == 1
    assert "knows square, disc, records.h5 has disc, square; run retrain again" in result.output
