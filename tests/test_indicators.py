"""Quality indicators, which need no truth, their limits, and the table of all images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.audit import indicators, score
from pipeline.audit.row_table import Row, RowTable
from pipeline.audit.score import Limits
from pipeline.audit.summary import summary
from pipeline.audit.tally import audit_of
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.jobs.evaluate import write_tables
from pipeline.stage_order import STAGES
from tests.test_evaluate import build, outs_of, tallied
from tests.toys import toy_image

PLAIN, ONE = np.zeros((4, 4), np.float32), np.ones(1, np.float32)
LABELS = LabelSpace(("cat", "<b>|x", "dog"))


def of(label: np.ndarray, tags: tuple[int, ...] | None, sure: int = 255) -> dict[str, float]:
    return indicators.mask_indicators(
        label.astype(np.uint8), np.full(label.shape, sure, np.uint8), indicators.ImageContext(tags, PLAIN)
    )


def test_a_tagged_class_without_pixels_and_a_class_nobody_tagged_are_seen() -> None:
    label = np.zeros((4, 4))
    label[0, :3], label[1, 0] = 1, 3
    found = of(label, (1, 2))
    assert (found["empty"], found["leak"], found["coverage"]) == (0.5, 0.25, 0.25)
    assert np.isnan(of(label, None)["leak"]) and np.isnan(of(label, None)["empty"])
    assert of(label, ())["leak"] == 1.0 and np.isnan(of(label, ())["empty"])


def test_components_fragments_and_holes_are_counted_per_class() -> None:
    label = np.zeros((9, 9))
    label[1:6, 1:6] = 1
    label[3, 3] = 0  # a hole of one pixel
    label[8, 8] = 1  # a fragment
    label[0:2, 7:9] = 2
    found = of(label, (1, 2))
    assert found["components"] == 1.5
    assert (found["fragments"], found["holes"]) == (pytest.approx(1 / 29), pytest.approx(1 / 29))


def test_a_notch_at_the_frame_is_no_hole() -> None:
    label = np.ones((5, 5))
    label[0, 2] = 0
    assert of(label, (1,))["holes"] == 0


@settings(max_examples=50, deadline=None)
@given(
    arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6)), elements=st.sampled_from([0, 1, 2, 255])),
    st.integers(0, 255),
)
def test_every_indicator_of_every_mask_is_a_number_in_its_range_or_missing(label: np.ndarray, sure: int) -> None:
    image = np.repeat(label[..., None], 3, axis=2)
    context = indicators.ImageContext((1,), indicators.edge_ranks(image))
    found = indicators.mask_indicators(label, np.full(label.shape, sure, np.uint8), context)
    assert list(found) == list(indicators.INDICATORS)
    for name, value in found.items():
        assert np.isnan(value) or value >= 0, name
        assert np.isnan(value) or name in ("components", "holes") or value <= 1, name
    assert indicators.mask_miou(label, label) == 1.0


def test_the_expected_iou_is_the_iou_that_confidences_promise() -> None:
    label = np.zeros((2, 4))
    label[0] = 1
    assert of(label, (1,))["expected_iou"] == 1.0
    half = of(label, (1,), sure=204)  # each class holds 4 * 0.8 of its pixels and 4 * 0.2 of the other's
    assert half["expected_iou"] == pytest.approx(3.2 / 4.8) and half["confidence"] == pytest.approx(0.8)
    assert of(np.zeros((2, 4)), (1,))["expected_iou"] == 0.5  # the tagged class has nothing


def test_borders_on_edges_rank_above_borders_beside_them() -> None:
    image, mask, _ = toy_image(2)
    ranks = indicators.edge_ranks(image)
    assert indicators.edge_alignment(mask, ranks) > 0.9 > 0.6 > indicators.edge_alignment(np.roll(mask, 9, axis=0), ranks)
    assert np.isnan(indicators.edge_alignment(mask * 0, ranks))


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (3, 2), (600, 300)])
def test_edges_of_any_size_have_ranks_of_a_bounded_size(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ranks = indicators.edge_ranks(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    assert max(ranks.shape) <= indicators.EDGE_SIDE and ranks.min() >= 0 and ranks.max() < 1
    label = rng.integers(0, 2, size).astype(np.uint8)
    assert np.isnan(value := indicators.edge_alignment(label, ranks)) or 0 <= value <= 1


def test_score_maps_that_part_clearly_are_separate_stable_and_certain() -> None:
    clear = np.zeros((1, 8, 8), np.float32)
    clear[0, :4] = 1.0
    vague = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    one, other = (
        indicators.score_map_indicators(maps, np.array([1]), np.array([0.0, 9.0]), ONE, 0.5) for maps in (clear, vague)
    )
    assert one["separation"] == pytest.approx(1) and one["stability"] == 1.0 and one["certainty"] > 0.99
    assert other["separation"] < 0.8 and other["stability"] < 0.9 and other["entropy"] > one["entropy"]
    assert indicators.score_map_indicators(np.zeros((0, 2, 2), np.float32), np.zeros(0), np.zeros(2), ONE[:0], 0.5) == {}
    assert (
        indicators.score_map_indicators(np.zeros((1, 1, 1), np.float32), np.array([0]), np.zeros(2), ONE, 0.5)["separation"]
        == 0.0
    )


def row(name: str, edges: float, share: float = 0.2, stage: str = "refined") -> Row:
    values = dict.fromkeys(indicators.INDICATORS, 0.0) | {
        "edges": edges,
        "expected_iou": 0.9,
        "separation": indicators.UNDEFINED,
    }
    return Row(
        name,
        stage,
        False,
        indicators.UNDEFINED,
        indicators.UNDEFINED,
        indicators.UNDEFINED,
        np.array([*values.values()], np.float32),
        ((1, share),),
    )


def test_an_odd_image_has_reasons_and_the_others_have_none() -> None:
    rows = [row(f"i{at:02d}", 0.8 + at / 1000, 0.2 + at / 200) for at in range(20)]
    rows += [row("odd", 0.1, 0.97), row("bare", 0.8, 0.0)]
    usual = Limits(RowTable.of(rows))
    names = ["background", *LABELS.names]
    reasons = {one.id: usual.reasons(one, ImageRecord(one.id, "", (1, 1), "train", (0,), b""), names) for one in rows}
    assert reasons.pop("odd") == ["coverage:cat", "edges"] and reasons.pop("bare") == ["empty:cat"]
    assert not any(reasons.values())


def test_too_few_images_have_no_limits() -> None:
    assert score.limits([0.5] * (score.MIN_IMAGES - 1) + [float("nan")] * 9) is None
    assert score.limits([0.5] * score.MIN_IMAGES) == (0.48, 0.52)


def test_the_score_is_the_mean_of_the_stages_terms_that_an_image_has() -> None:
    terms = {"separation": 0.3, "expected_iou": 0.6, "edges": 0.9}
    assert score.score("pseudo_masks", terms) == pytest.approx(0.6)
    assert score.score("score_maps", terms) == pytest.approx(0.45) and score.score("predictions", terms) == 0.6
    assert score.score("refined", terms | {"separation": indicators.UNDEFINED}) == pytest.approx(0.75)
    assert np.isnan(score.score("refined", terms | {"expected_iou": indicators.UNDEFINED}))
    assert np.isnan(score.score("decoder", terms))


def test_a_skewed_indicator_has_a_limit_on_each_side_of_its_own() -> None:
    skewed = [0.5 - 0.001 * at for at in range(10)] + [0.5 + 0.03 * at for at in range(10)]
    low, high = score.limits(skewed) or (1, 0)
    assert low == 0.48 and high > 1


def test_a_class_that_grows_beside_another_is_named() -> None:
    records, rows = {}, []
    for at in range(20):
        tags = (0, 2) if at % 2 else (0,)
        records[f"i{at}"] = ImageRecord(f"i{at}", "", (1, 1), "train", tags, b"")
        shares = ((1, 0.4), (3, 0.1)) if at % 2 else ((1, 0.1),)
        rows.append(Row(f"i{at}", "refined", False, 0, 0, 0, np.zeros(len(indicators.INDICATORS), np.float32), shares))
    found = score.co_occurrence(rows, records, ["background", *LABELS.names])
    assert [(one["class"], one["with"], one["images"]) for one in found] == [("cat", "dog", 10)]
    assert (found[0]["share_with"], found[0]["share_without"]) == (pytest.approx(0.4), pytest.approx(0.1))


def test_the_table_has_a_row_per_image_and_stage_and_survives_hostile_names(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, decoder=True)
    audit = audit_of(tallied(inputs, read))
    figures = summary(audit, inputs, read, "")
    outs = outs_of(tmp_path)
    write_tables(audit, figures, read, outs)
    text = outs.images.read_bytes().decode("utf-8")
    assert "\r" not in text
    rows = list(csv.DictReader(text.splitlines()))
    assert [*rows[0]][: len(score.COLUMNS)] == list(score.COLUMNS) and set(indicators.INDICATORS) <= set(rows[0])
    order = list(STAGES)
    assert [(one["id"], one["stage"]) for one in rows] == sorted(
        ((one["id"], one["stage"]) for one in rows), key=lambda pair: (pair[0], order.index(pair[1]))
    )
    assert len(rows) == 5 * 4 + 3 * 3 and {one["id"] for one in rows} == {one.id for one in read}
    assert rows[0]["tags"].split("|") == [read.labels.names[tag] for tag in read.images[0].tags or ()]
    decoded = [one for one in rows if one["stage"].startswith("decoder")]
    assert all(one["score"] == "" and one["miou"] == "1" for one in decoded)
    masks = [one for one in rows if one["stage"] == "pseudo_masks"]
    assert all(0 < float(one["score"]) <= 1 and float(one["broken"]) > 0 for one in masks)
    assert figures["score"]["pseudo_masks"]["images"] == 5
    flows = {(one["from"], one["to"]) for one in figures["flow"]}
    assert flows == {("score_maps", "decoder"), ("score_maps", "refined"), ("refined", "pseudo_masks"),
                     ("score_maps_val", "decoder_val"), ("decoder_val", "predictions")}  # fmt: skip


def test_without_truth_the_table_has_scores_and_no_figures_of_truth(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, with_truth=0)
    audit = audit_of(tallied(inputs, read))
    figures = summary(audit, inputs, read, "")
    assert figures["flow"] == [] and "score" not in figures and figures["indicators"]["pseudo_masks"]["ignored"] > 0
    score.write(tmp_path / "i.csv", audit.rows, read.by_id(), read.labels, audit.limits, audit.scores)
    rows = list(csv.DictReader((tmp_path / "i.csv").open(encoding="utf-8", newline="")))
    assert {(one["truth"], one["miou"], one["corrected"]) for one in rows} == {("0", "", "")}
    last = [float(one["score"]) for one in rows if one["stage"] in ("pseudo_masks", "predictions")]
    assert audit.quality.tolist() == pytest.approx(last, abs=1e-4)


def test_tags_in_the_table_are_told_from_no_tags_and_from_a_bar_in_a_name() -> None:
    record = ImageRecord("i", "", (1, 1), "train", (0, 1), b"")
    assert score._tags(record, LABELS) == "cat|<b>%7Cx"
    assert score._tags(ImageRecord("i", "", (1, 1), "train", (), b""), LABELS) == ""
    assert score._tags(ImageRecord("i", "", (1, 1), "val", None, b""), LABELS) == "?"
