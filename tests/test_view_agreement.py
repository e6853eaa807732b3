"""View agreement: what holds for any score maps, what extract stores of it, and the quality indicator."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.audit import indicators
from pipeline.audit.tally import audit_of
from pipeline.core import plugins
from pipeline.core.records import ImageRecord
from pipeline.imaging.scoremaps import merge_views, upright, view_agreement
from pipeline.jobs import score_maps
from pipeline.stage_order import STAGES
from tests.test_evaluate import build, tallied
from tests.test_methods import SETTINGS, built

RULES = ("irn", "afa", "weaktr", "mean")
rules = st.sampled_from(RULES)
sides = st.integers(1, 9)
wide = st.integers(2, 9)  # a map of one cell is constant, and what is left of one less its minimum is rounding
seeds = st.integers(0, 2**31)


def made(seed: int, classes: int, grids: list[tuple[int, int]], flip: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(2 if flip else 1, classes, *grid, generator=generator) for grid in grids]


def agreed(views: list[Tensor], rule: str, size: tuple[int, int]) -> Tensor:
    return view_agreement(views, rule=rule, size=size)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(seeds, rules, st.integers(0, 4), st.lists(st.tuples(sides, sides), min_size=1, max_size=3), st.tuples(sides, sides))
def test_agreement_is_a_fraction_per_class_of_maps_of_any_size(
    seed: int, rule: str, classes: int, grids: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    agreement = agreed(made(seed, classes, grids), rule, size)
    assert agreement.shape == (classes,) and ((agreement >= 0) & (agreement <= 1)).all()


@settings(max_examples=60, deadline=None)
@given(seeds, rules, st.lists(st.tuples(wide, wide), min_size=1, max_size=3), st.tuples(wide, wide))
def test_neither_the_order_of_views_nor_a_mirrored_image_changes_it(
    seed: int, rule: str, grids: list[tuple[int, int]], size: tuple[int, int]
) -> None:
    views = made(seed, 3, grids)
    agreement = agreed(views, rule, size)
    torch.testing.assert_close(agreed(views[::-1], rule, size), agreement, atol=1e-5, rtol=0)
    torch.testing.assert_close(agreed([view.flip(0) for view in views], rule, size), agreement, atol=1e-4, rtol=0)


@settings(max_examples=30, deadline=None)
@given(seeds, rules, st.integers(1, 3), st.tuples(sides, sides), st.tuples(sides, sides))
def test_maps_that_the_mirror_image_and_all_scales_confirm_agree_fully(
    seed: int, rule: str, classes: int, grid: tuple[int, int], size: tuple[int, int]
) -> None:
    [plain] = made(seed, classes, [grid], flip=False)
    both_rows = torch.cat([plain, plain.flip(-1)])
    evidence = merge_views([plain], rule=rule, size=size).amax(dim=(1, 2)) > 0  # type: ignore[arg-type]
    torch.testing.assert_close(agreed([both_rows, both_rows.clone()], rule, size), evidence.float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
def test_views_that_see_a_class_in_different_places_do_not_agree(rule: str) -> None:
    left = torch.zeros(1, 1, 4, 8)
    left[..., :3] = 5.0
    as_told = torch.cat(
        [left, left]
    )  # the mirror image's map lies on the same side, so on the other side once mirrored back
    assert agreed([as_told], rule, (4, 8)).tolist() == [0.0]
    three = agreed([torch.cat([left, left.flip(-1)]), left.flip(-1)], rule, (4, 8))  # one pair of three agrees
    assert three.tolist() == [pytest.approx(1 / 3, abs=1e-5)]


@pytest.mark.parametrize("rule", ["irn", "afa", "weaktr"])
def test_only_the_shape_of_a_view_counts_and_not_its_scale(rule: str) -> None:
    view = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(3))
    assert agreed([view, view * 7], rule, (5, 6)).tolist() == [pytest.approx(1, abs=1e-4)] * 2


def test_overlap_is_the_sum_of_minima_over_the_sum_of_maxima() -> None:
    first, second = torch.tensor([[[[1.0, 0.5, 0.0, 0.0]]]]), torch.tensor([[[[0.5, 1.0, 0.5, 0.0]]]])
    assert agreed([first, second], "mean", (1, 4)).item() == pytest.approx(1.0 / 2.5)


@pytest.mark.parametrize("rule", RULES)
def test_a_class_that_no_view_or_only_one_view_sees_agrees_by_0_and_leaves_the_others_alone(rule: str) -> None:
    views = made(0, 3, [(4, 5)])
    views[0][1] = views[0][0].flip(-1)
    views[0][:, 1] = 0
    views[0][0, 2] = 0
    assert agreed(views, rule, (4, 5)).tolist() == [pytest.approx(1), 0.0, 0.0]


@pytest.mark.parametrize("rule", RULES)
def test_one_view_has_nothing_to_agree_with(rule: str) -> None:
    assert agreed(made(0, 2, [(3, 4)], flip=False), rule, (5, 5)).isnan().tolist() == [True, True]
    assert agreed(made(0, 0, [(3, 4)], flip=False), rule, (5, 5)).shape == (0,)


def test_an_unknown_rule_is_an_error_that_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="irn, afa, weaktr, mean"):
        agreed(made(0, 1, [(2, 2)]), "median", (2, 2))


def test_the_mirrored_row_alone_is_turned_back() -> None:
    view = torch.arange(6.0).reshape(2, 1, 1, 3)
    assert [upright_map.flatten().tolist() for upright_map in upright(view)] == [[0, 1, 2], [5, 4, 3]]
    assert [upright_map.flatten().tolist() for upright_map in upright(view[1:])] == [[3, 4, 5]]


def extracted(size: tuple[int, int], tags: tuple[int, ...], **changes: Any) -> np.ndarray:
    """Field `agreement` of an image that a network without training sees."""
    given_settings = dataclasses.replace(SETTINGS, **changes)
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    record = ImageRecord("x", "x.png", size, "train", tags, b"")
    options = plugins.load("methods", "cam").Options()
    return score_maps.score([image], [record], CAM, options, given_settings, "cpu")[0]["agreement"]


CAM = built("cam", "vit", "scenes_vit").eval()


@pytest.mark.parametrize("size", [(1, 1), (61, 83)])
def test_extract_keeps_one_agreement_per_kept_class(size: tuple[int, int]) -> None:
    agreement = extracted(size, (0, 2), flip=True, scales=(1.0, 1.5))
    assert agreement.dtype == np.float16 and agreement.shape == (2,) and ((agreement >= 0) & (agreement <= 1)).all()
    assert np.isnan(extracted(size, (0, 2), flip=False, scales=(1.0,))).tolist() == [True, True]
    assert extracted(size, (), flip=True, scales=(1.0,)).shape == (0,)


@pytest.mark.parametrize("changes", [{"flip": True, "scales": (1.0,)}, {"flip": False, "scales": (1.0, 1.5)}])
def test_two_views_by_mirror_or_by_scale_are_enough(changes: dict[str, Any]) -> None:
    assert 0 < extracted((61, 83), (1,), **changes).item() < 1


def test_the_indicator_is_the_mean_over_classes_and_missing_where_there_is_no_pair() -> None:
    maps, classes, logits = np.ones((2, 3, 3), np.float32), np.array([0, 1]), np.zeros(2)
    found = indicators.score_map_indicators(maps, classes, logits, np.array([0.2, 0.6], np.float32), 0.5)
    assert found["view_agreement"] == pytest.approx(0.4)
    assert np.isnan(
        indicators.score_map_indicators(maps, classes, logits, np.full(2, np.nan, np.float32), 0.5)["view_agreement"]
    )
    assert "view_agreement" not in indicators.score_map_indicators(
        maps[:0], classes[:0], logits, np.zeros(0, np.float32), 0.5
    )


def test_the_indicator_stands_at_every_stage_that_comes_from_score_maps(tmp_path: Any) -> None:
    inputs, read = build(tmp_path, decoder=True)
    at = list(indicators.INDICATORS).index("view_agreement")
    rows = audit_of(tallied(inputs, read)).rows
    values = {(row.stage, float(row.indicators[at])) for row in rows if row.stage != "predictions"}
    assert values == {(stage, 0.5) for stage in STAGES if stage not in ("predictions", "relabelled")}
    assert all(np.isnan(row.indicators[at]) for row in rows if row.stage == "predictions")
