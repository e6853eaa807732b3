"""Merging views into score maps: the three published rules, and what holds for any input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.imaging.scoremaps import merge_views, trinary_labels
from tests.shared_data import golden


def test_the_irn_rule_gives_the_golden_maps_at_stride_4() -> None:
    case = golden("cam_merge")
    views = [torch.from_numpy(case[f"irn_view_scale{scale:.1f}"])[:, case["irn_keys"]] for scale in case["irn_scales"]]
    h, w = case["irn_size"]
    merged = merge_views(views, rule="irn", size=(-(-h // 4), -(-w // 4)))
    np.testing.assert_allclose(merged.numpy(), case["irn_cam"], atol=1e-5)


def test_the_afa_rule_gives_the_golden_maps() -> None:
    case = golden("cam_merge")
    for row in range(2):
        views = [torch.from_numpy(case[f"afa_view_scale{scale:g}"])[[row, 2 + row]] for scale in case["afa_scales"]]
        merged = merge_views(views, rule="afa", size=tuple(int(side) for side in case["afa_size"]))
        np.testing.assert_allclose(merged.numpy(), case["afa_cam"][row], atol=1e-5)


def test_the_weaktr_rule_gives_the_golden_maps() -> None:
    case = golden("cam_merge")
    views = []
    for scale in case["weaktr_scales"]:
        pair = []
        for flip in (0, 1):
            fused = torch.from_numpy(case[f"weaktr_view_scale{scale:.1f}_flip{flip}_fused"])
            attention = torch.from_numpy(case[f"weaktr_view_scale{scale:.1f}_flip{flip}_patch_attn"])
            pair.append((fused.flatten(1) @ attention.T).reshape(fused.shape))
        views.append(torch.stack(pair))
    merged = merge_views(views, rule="weaktr", size=tuple(int(side) for side in case["weaktr_size"]))
    np.testing.assert_allclose(merged.numpy(), case["weaktr_cam"], atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rule=st.sampled_from(["irn", "afa", "weaktr"]),
    classes=st.integers(0, 4),
    flip=st.booleans(),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_merged_maps_stay_in_0_to_1_and_mirror_with_the_image(
    seed: int, rule: str, classes: int, flip: bool, size: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    views = [torch.rand(2 if flip else 1, classes, side, side + 1, generator=generator) for side in (2, 3)]
    merged = merge_views(views, rule=rule, size=size)  # type: ignore[arg-type]
    assert merged.shape == (classes, *size)
    if classes:
        assert merged.min() >= 0 and merged.max() <= 1
    if flip:
        mirrored = merge_views([view.flip(0) for view in views], rule=rule, size=size)  # type: ignore[arg-type]
        torch.testing.assert_close(mirrored.flip(-1), merged, atol=1e-5, rtol=0)


def test_probabilities_are_averaged_as_they_are() -> None:
    views = [torch.tensor([[[[0.2, 0.4]]], [[[0.8, 0.0]]]]), torch.tensor([[[[0.6, 0.6]]], [[[0.6, 0.6]]]])]
    expected = torch.tensor([[[(0.2 + 0.0 + 1.2) / 4, (0.4 + 0.8 + 1.2) / 4]]])
    torch.testing.assert_close(merge_views(views, rule="mean", size=(1, 2)), expected)


def test_an_unknown_merge_rule_is_an_error_that_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="irn, afa, weaktr"):
        merge_views([torch.zeros(1, 1, 2, 2)], rule="median", size=(2, 2))  # type: ignore[arg-type]


def test_trinary_labels_keep_classes_above_the_high_threshold_and_ignore_those_above_the_low_one_alone() -> None:
    low, high = np.array([0, 3, 3, 2], np.uint8), np.array([0, 0, 3, 1], np.uint8)
    np.testing.assert_array_equal(trinary_labels(low, high), [0, 255, 3, 1])
    np.testing.assert_array_equal(trinary_labels(torch.from_numpy(low), torch.from_numpy(high)).numpy(), [0, 255, 3, 1])
