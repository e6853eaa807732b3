"""Figures with truth: bands, calibration, resamples and what a stage corrects, each against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from pipeline import metrics
from pipeline.audit import truth

CLASSES = 3
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
VALUES = st.sampled_from([0, 1, 2, 255])


@st.composite
def pairs(draw: st.DrawFn, maps: int = 2) -> list[np.ndarray]:
    shape = draw(SHAPES)
    return [draw(arrays(np.uint8, shape, elements=VALUES)) for _ in range(maps)]


def eroded(mask: np.ndarray, distance: int) -> np.ndarray:
    """Pixels whose whole square of side 2 * distance + 1 is in the mask; outside the image nothing is."""
    return ndimage.binary_erosion(mask, np.ones((2 * distance + 1, 2 * distance + 1)))


def under(mask: np.ndarray, shown: np.ndarray, protocol: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels of the truth that count, the prediction) under a protocol, by its definition."""
    kept = mask != 255
    if protocol == "excluded":
        kept = kept & (shown != 255)
    if protocol == "background":
        shown = np.where(shown == 255, 0, shown)
    return kept, shown


@settings(max_examples=80, deadline=None)
@given(maps=pairs(), distance=st.integers(1, 3), protocol=st.sampled_from(metrics.PROTOCOLS))
def test_boundary_iou_is_that_of_masks_less_their_erosions(
    maps: list[np.ndarray], distance: int, protocol: metrics.Protocol
) -> None:
    mask, label = maps
    contour, frame = metrics.near_label_change(mask, distance), metrics.near_frame(mask.shape, distance)
    counts = truth.count(truth.Truth(mask, distance, contour, contour | frame, frame), label, None, CLASSES, protocol)
    found = metrics.iou_of_totals(counts.boundary)
    kept, shown = under(mask, label, protocol)
    for value in range(CLASSES):
        first = (mask == value) & ~eroded(mask == value, distance) & kept
        second = (shown == value) & ~eroded(shown == value, distance) & kept
        either = (first | second).sum()
        if either == 0:
            assert np.isnan(found[value])
        else:
            assert found[value] == pytest.approx((first & second).sum() / either)


@settings(max_examples=60, deadline=None)
@given(maps=pairs(), protocol=st.sampled_from(metrics.PROTOCOLS))
def test_trimap_iou_counts_only_pixels_near_another_true_label(maps: list[np.ndarray], protocol: metrics.Protocol) -> None:
    mask, label = maps
    h, w = mask.shape
    near = np.zeros(mask.shape, bool)
    for y in range(h):
        for x in range(w):
            near[y, x] = (mask[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2] != mask[y, x]).any()
    assert metrics.boundary_distance(mask.shape) == 1
    found = metrics.iou(truth.count(truth.with_bands(mask), label, None, CLASSES, protocol).trimap, protocol=protocol)
    expected = metrics.iou(metrics.confusion(mask[near], label[near], CLASSES), protocol=protocol)
    np.testing.assert_array_equal(found, expected)


def test_the_boundary_distance_is_two_percent_of_the_diagonal_and_at_least_a_pixel() -> None:
    assert (
        metrics.boundary_distance((300, 400)),
        metrics.boundary_distance((1, 1)),
        metrics.boundary_distance((3000, 4000)),
    ) == (10, 1, 100)


@settings(max_examples=60, deadline=None)
@given(maps=pairs(3), protocol=st.sampled_from(metrics.PROTOCOLS))
def test_corrected_less_broken_is_the_gain_in_right_pixels(maps: list[np.ndarray], protocol: metrics.Protocol) -> None:
    mask, before, after = maps
    corrected, broken, total = truth.changed_pixels(mask, before, after, CLASSES, protocol)
    for value in range(CLASSES):
        of_class = mask == value
        if protocol == "excluded":
            of_class &= (before != 255) & (after != 255)
        first, second = (under(mask, one, protocol)[1] == value for one in (before, after))
        assert total[value] == of_class.sum()
        assert corrected[value] == (of_class & ~first & second).sum() and broken[value] == (of_class & first & ~second).sum()


def test_a_stage_that_changes_nothing_corrects_and_breaks_nothing() -> None:
    flow = truth.Flow.empty(2)
    mask = np.eye(4, dtype=np.uint8)
    flow.count(truth.changed_pixels(mask, mask * 0, mask * 0, 2, "background"), 0.5, 0.505)
    values = flow.as_values(["background", "x"])
    assert (
        values["corrected"],
        values["broken"],
        values["images_corrected"],
        values["images_broken"],
        values["images"],
    ) == (0, 0, 0, 0, 1)


@settings(max_examples=40, deadline=None)
@given(maps=pairs(), seed=st.integers(0, 1000))
def test_the_calibration_error_is_the_mean_gap_between_confidence_and_accuracy(maps: list[np.ndarray], seed: int) -> None:
    mask, label = maps
    sure = np.random.default_rng(seed).integers(0, 256, mask.shape).astype(np.uint8)
    counts = truth.count(truth.with_bands(mask), label, sure, CLASSES, "background").calibration
    assert counts is not None
    kept = (mask != 255) & (label != 255)
    diagram = metrics.reliability(counts)
    if not kept.any():
        assert diagram == {"bins": [], "ece": None}
        return
    level, right = sure[kept] / 255, (mask == label)[kept]
    at = np.minimum((level * metrics.CALIBRATION_BINS).astype(int), metrics.CALIBRATION_BINS - 1)
    gaps = [abs(level[at == one].mean() - right[at == one].mean()) * (at == one).mean() for one in np.unique(at)]
    assert diagram["ece"] == pytest.approx(sum(gaps)) and len(diagram["bins"]) == len(gaps)  # type: ignore[arg-type]
    assert sum(share for _, _, share in diagram["bins"]) == pytest.approx(1)  # type: ignore[attr-defined]


def images(count: int, seed: int) -> list[np.ndarray]:
    """Confusions of a population in which some images are far worse than others."""
    rng = np.random.default_rng(seed)
    found = []
    for quality in rng.beta(4, 2, count):
        size = rng.integers(200, 2000)
        hit, rest = int(size * quality), int(size * (1 - quality))
        found.append(np.array([[8000 - rest, rest // 2, 0], [rest - rest // 2, hit, 0]]))
    return found


def interval_of(counts: list[np.ndarray], names: list[str]) -> list[float] | None:
    sums = truth.StageCounts.empty(2)
    for one, name in zip(counts, names, strict=True):
        sums.count(
            truth.ImageCounts(one, one, np.zeros((3, 2), np.int64), None), metrics.poisson_weights(name), "background"
        )
    return truth.figures(sums, ["background", "x"], "background")["interval"]["miou"]


def test_intervals_hold_the_figure_of_the_whole_set_about_as_often_as_they_say() -> None:
    whole = metrics.miou(np.asarray(sum(images(4000, 0))), protocol="background")
    held = 0
    for trial in range(150):
        low, high = interval_of(images(25, trial + 1), [f"{trial} {at}" for at in range(25)]) or (1, 0)
        held += low <= whole <= high
    assert 0.90 <= held / 150 <= 1.0


def test_fewer_images_give_wider_intervals_and_one_image_gives_none() -> None:
    counts = images(100, 3)
    names = [f"i{at}" for at in range(100)]
    widths = [high - low for low, high in (interval_of(counts[:n], names[:n]) or (0, 0) for n in (100, 25, 6))]
    assert widths[0] < widths[1] < widths[2]
    assert interval_of(counts[:1], names[:1]) is None


def test_resamples_depend_on_ids_alone_and_not_on_the_order_of_images() -> None:
    counts, names = images(9, 5), [f"größe {at}" for at in range(9)]
    assert interval_of(counts, names) == interval_of(counts[::-1], names[::-1])
    weights = np.concatenate([metrics.poisson_weights(str(at)) for at in range(200)])
    assert abs(weights.mean() - 1) < 0.02 and abs(weights.var() - 1) < 0.03 and weights.min() == 0


@settings(deadline=None)  # the first call imports scipy.stats
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_the_rank_correlation_is_pearsons_of_the_mean_ranks(values: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in values], [b for _, b in values]
    found = metrics.spearman(first, second)
    if len(values) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        ranks = [[sum(b < a for b in side) + (side.count(a) + 1) / 2 for a in side] for side in (first, second)]
        assert found == pytest.approx(np.corrcoef(ranks)[0, 1])
