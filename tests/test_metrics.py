"""Confusion, IoU and the three ways to count a predicted 255."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline import metrics
from pipeline.metrics import score_histogram, threshold_curve
from tests.shared_data import golden

LABELS = st.sampled_from([0, 1, 2, 255])
MAPS = arrays(np.uint8, (5, 4), elements=LABELS)


@pytest.mark.parametrize(
    ("prefix", "prediction", "protocol"),
    [
        ("all_classes", "pred", "excluded"),
        ("pred255_background", "pred_with_255", "background"),
        ("pred255_as_miss", "pred_with_255", "miss"),
        ("pred255_excluded", "pred_with_255", "excluded"),
    ],
)
def test_the_golden_iou_comes_out(prefix: str, prediction: str, protocol: metrics.Protocol) -> None:
    case = golden("miou")
    counts = metrics.confusion(case["gt"], case[prediction], int(case["num_classes"]))
    values = metrics.iou(counts, protocol=protocol)
    np.testing.assert_allclose(np.nan_to_num(values, nan=-1), case[f"f64_{prefix}_iou"], atol=1e-9)
    if prefix != "pred255_excluded":  # that mean leaves out classes that only the prediction has
        assert metrics.miou(counts, protocol=protocol) == pytest.approx(float(case[f"f64_{prefix}_miou"]), abs=1e-9)
    if f"f64_{prefix}_pixel_acc" in case:
        accuracy = metrics.pixel_accuracy(counts, protocol=protocol)
        assert accuracy == pytest.approx(float(case[f"f64_{prefix}_pixel_acc"]), abs=1e-9)


def test_the_golden_counts_come_out_exactly() -> None:
    case = golden("miou")
    counts = metrics.confusion(case["gt"], case["pred"], 21)
    np.testing.assert_array_equal(counts[:, :-1], case["confusion"])
    square = metrics.confusion(case["gt"], case["pred_with_255"], 21)
    np.testing.assert_array_equal(square[:, :-1], case["confusion_pred255_excluded"])


@settings(max_examples=60, deadline=None)
@given(truth=MAPS, prediction=MAPS, protocol=st.sampled_from(metrics.PROTOCOLS))
def test_iou_agrees_with_counting_by_hand_and_the_three_rates_sum_to_one(
    truth: np.ndarray, prediction: np.ndarray, protocol: metrics.Protocol
) -> None:
    counts = metrics.confusion(truth, prediction, 3)
    rates = metrics.rates(counts, protocol=protocol)
    kept = truth != 255
    guess = prediction.copy()
    if protocol == "excluded":
        kept &= prediction != 255
    elif protocol == "background":
        guess[guess == 255] = 0
    for label in range(3):
        both = int(((truth == label) & (guess == label) & kept).sum())
        either = int((((truth == label) | (guess == label)) & kept).sum())
        if either == 0:
            assert np.isnan(rates["iou"][label])
            continue
        assert rates["iou"][label] == pytest.approx(both / either)
        assert rates["iou"][label] + rates["over_activation"][label] + rates["under_activation"][label] == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), bins=st.integers(2, 12))
def test_one_pass_gives_the_same_curve_as_one_confusion_per_level(seed: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.choice(np.array([0, 1, 2, 255], np.uint8), (6, 7))
    winner, best = rng.integers(1, 3, (6, 7)).astype(np.uint8), rng.random((6, 7), np.float32)
    curve = threshold_curve(score_histogram(truth, winner, best, 3, bins))
    for k in range(bins):
        label = np.where(np.floor(best * bins) >= k, winner, 0).astype(np.uint8)
        expected = metrics.miou(metrics.confusion(truth, label, 3), protocol="background")
        assert curve[k] == pytest.approx(expected, nan_ok=True)


def test_maps_of_other_sizes_or_values_are_refused() -> None:
    with pytest.raises(ValueError, match="one size"):
        metrics.confusion(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 2)
    with pytest.raises(ValueError, match=r"allowed are 0\.\.1 and 255"):
        metrics.confusion(np.zeros((2, 2), np.uint8), np.full((2, 2), 7, np.uint8), 2)
    with pytest.raises(ValueError, match="excluded, background, miss"):
        metrics.iou(np.zeros((2, 3), np.int64), protocol="other")  # type: ignore[arg-type]
