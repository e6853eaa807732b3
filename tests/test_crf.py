"""Dense CRF: golden vectors, both unaries, and the smallest inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config
from pipeline.core.config import ParamsError
from pipeline.crf import CrfSettings, dense_crf, unary_from_labels, unary_from_probabilities

GOLDEN = Path(__file__).parents[1].parent / "shared" / "golden" / "crf.npz"
CASES = ("psa_labels", "irn_hard", "weaktr_voc_hard", "mctformer_seg", "weaktr_seg_voc", "weaktr_seg_coco", "afa_infer")
IRN = CrfSettings(10, 3.0, 3.0, 50.0, 5.0, 10.0)


def golden() -> dict[str, np.ndarray]:
    if not GOLDEN.exists():
        pytest.skip("../shared is absent")
    with np.load(GOLDEN) as file:
        return dict(file)


def settings_of(values: np.ndarray) -> CrfSettings:
    iterations, *rest = (float(value) for value in values)
    return CrfSettings(int(iterations), *rest)


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_the_golden_case(case: str) -> None:
    data = golden()
    unary = data["hard_unary"] if data[f"{case}_hard_unary"] else data["soft_unary"]
    found = dense_crf(data["image_u8"], unary, settings_of(data[f"{case}_settings"]))
    np.testing.assert_allclose(found, data[f"{case}_prob"], atol=1e-5)
    np.testing.assert_array_equal(found.argmax(axis=0), data[f"{case}_argmax"])


def test_one_iteration_is_that_of_the_golden_case() -> None:
    data = golden()
    one = np.concatenate([[1], data["weaktr_seg_voc_settings"][1:]])
    found = dense_crf(data["image_u8"], data["soft_unary"], settings_of(one))
    np.testing.assert_allclose(found, data["weaktr_seg_voc_1iter_prob"], atol=1e-5)


def test_both_unaries_are_those_of_the_golden_case() -> None:
    data = golden()
    hard = unary_from_labels(data["hard_label"], 3, gt_prob=float(data["gt_prob"]))
    np.testing.assert_allclose(hard, data["hard_unary"], atol=1e-6)
    np.testing.assert_allclose(unary_from_probabilities(data["soft_prob"]), data["soft_unary"], atol=1e-6)


def test_a_hard_unary_is_a_distribution_with_gt_prob_at_the_label() -> None:
    probabilities = np.exp(-unary_from_labels(np.array([[0, 2]], np.uint8), 3, gt_prob=0.7))
    np.testing.assert_allclose(probabilities, [[0.7, 0.15], [0.15, 0.15], [0.15, 0.7]], rtol=1e-6)


def test_a_probability_of_zero_has_a_finite_energy() -> None:
    np.testing.assert_allclose(unary_from_probabilities(np.zeros((1, 1, 1))), -np.log(1e-5), rtol=1e-6)


@pytest.mark.parametrize("gt_prob", [0.0, 1.0])
def test_a_certain_label_is_refused(gt_prob: float) -> None:
    with pytest.raises(ValueError, match="gt_prob"):
        unary_from_labels(np.zeros((2, 2), np.uint8), 2, gt_prob=gt_prob)


def test_background_alone_is_certain_everywhere() -> None:
    unary = unary_from_labels(np.zeros((4, 5), np.uint8), 1, gt_prob=0.7)
    assert np.isfinite(unary).all()
    np.testing.assert_array_equal(dense_crf(np.zeros((4, 5, 3), np.uint8), unary, IRN), np.ones((1, 4, 5)))


def test_a_read_only_image_as_pillow_gives_it_is_taken_and_left_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    unary = unary_from_labels(np.eye(6, 7, dtype=np.uint8), 2, gt_prob=0.7)
    writable = dense_crf(image.copy(), unary, IRN)
    image.flags.writeable = False
    np.testing.assert_array_equal(dense_crf(image, unary, IRN), writable)


@settings(max_examples=25, deadline=None)
@given(h=st.integers(1, 9), w=st.integers(1, 9), planes=st.integers(1, 5), seed=st.integers(0, 99))
def test_probabilities_sum_to_one_at_every_pixel_of_any_size(h: int, w: int, planes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
    scores = rng.random((planes, h, w), np.float32) + np.float32(0.01)
    found = dense_crf(image, unary_from_probabilities(scores / scores.sum(axis=0)), IRN)
    assert found.shape == (planes, h, w) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


def test_a_kernel_of_weight_zero_is_left_out() -> None:
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    probabilities = np.random.default_rng(2).dirichlet([1, 1], (8, 8)).transpose(2, 0, 1).astype(np.float32)
    found = dense_crf(image, unary_from_probabilities(probabilities), CrfSettings(5, 3.0, 0.0, 50.0, 5.0, 0.0))
    np.testing.assert_allclose(found, probabilities, atol=2e-5)


def test_settings_out_of_range_are_named() -> None:
    section = {
        "iterations": 0, "gaussian_sxy": 0, "gaussian_compat": -1, "bilateral_sxy": 50,
        "bilateral_srgb": 5, "bilateral_compat": 10,
    }  # fmt: skip
    with pytest.raises(ParamsError) as caught:
        config.parse(CrfSettings, section, "crf")
    assert all(f"crf.{key}" in str(caught.value) for key in ("iterations", "gaussian_sxy", "gaussian_compat"))
