"""Method agreement: what it is of two masks, of an image, of all; and the small masks that it is counted from."""

from __future__ import annotations

import csv
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.audit.tally import BatchTally, Tally, add_batches, tally_batch
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.report import audits, image_table, method_agreement, rows
from tests import page_case
from tests.test_evaluate import SETTINGS, build

LABELS = LabelSpace(("x", "y"))
MASKS = arrays(np.uint8, (4, 5), elements=st.sampled_from([0, 1, 2, 255]))


@given(MASKS, MASKS)
def test_two_masks_agree_by_the_mean_iou_of_what_both_decide(first: np.ndarray, second: np.ndarray) -> None:
    pixels = [(a, b) for a, b in zip(first.ravel(), second.ravel(), strict=True) if 255 not in (a, b)]
    ious = [
        sum(a == b == value for a, b in pixels) / sum(value in (a, b) for a, b in pixels)
        for value in {value for pair in pixels for value in pair}
    ]
    assert method_agreement.mask_agreement(first, second) == pytest.approx(
        sum(ious) / len(ious) if ious else np.nan, nan_ok=True
    )


@given(st.lists(MASKS, min_size=2, max_size=4), st.randoms())
def test_the_table_is_symmetric_and_follows_the_order_of_the_methods(masks: list[np.ndarray], random: object) -> None:
    found = method_agreement.agreement_matrix(masks)
    np.testing.assert_array_equal(found, found.T)
    assert (np.diag(found) == 1).all() and np.nanmin(found) >= 0 and np.nanmax(found) <= 1
    order = list(range(len(masks)))
    random.shuffle(order)  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(
        method_agreement.agreement_matrix([masks[at] for at in order]), found[np.ix_(order, order)]
    )
    np.testing.assert_allclose(
        method_agreement.mean_agreement(found[np.ix_(order, order)])[0], method_agreement.mean_agreement(found)[0][order]
    )


@given(MASKS, st.integers(2, 4))
def test_the_same_mask_everywhere_agrees_wholly_and_disjoint_ones_not_at_all(mask: np.ndarray, count: int) -> None:
    mask[0, 0] = 0
    assert method_agreement.agreement_matrix([mask] * count).min() == 1
    apart = [np.full((3, 3), value, np.uint8) for value in range(count)]
    values, compared = method_agreement.mean_agreement(method_agreement.agreement_matrix(apart))
    assert (values == 0).all() and (compared == count - 1).all()


def test_a_run_that_lacks_the_image_is_left_out() -> None:
    first, second = np.array([[0, 1]], np.uint8), np.array([[1, 1]], np.uint8)
    values, compared = method_agreement.mean_agreement(method_agreement.agreement_matrix([first, None, second]))
    assert values.tolist() == [0.25, pytest.approx(np.nan, nan_ok=True), 0.25] and compared.tolist() == [1, 0, 1]
    assert np.isnan(method_agreement.mean_agreement(method_agreement.agreement_matrix([first, None]))[0]).all()


def write(folder: Path, method: str, masks: Mapping[str, np.ndarray] | Iterator[tuple[str, np.ndarray]]) -> None:
    pairs = masks.items() if isinstance(masks, Mapping) else masks
    store.write_part(
        folder / f"{method}.h5", store.SMALL_MASKS, ((i, {"mask": mask}) for i, mask in pairs), labels=LABELS, part=0,
        parts=1,
        params_digest="", compression="gzip",
    )  # fmt: skip


def agreement_of(folder: Path, methods: list[str]) -> tuple[dict[str, dict[str, tuple[float, int]]], dict[str, np.ndarray]]:
    """Run → id → agreement, and the matrices by split, of small masks of which each has a row."""
    for method in methods:
        with (folder / f"{method}.csv").open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(rows.COLUMNS)
            for image_id in store.Store(folder / f"{method}.h5", store.SMALL_MASKS).ids:
                lines.writerow([image_id, "predictions" if image_id.startswith("v") else "refined", "", "", ""])
    images, agreement = {method: {} for method in methods}, method_agreement.Agreement(methods)
    for image_id, of_run, masks in audits.images(folder, methods):
        split = "val" if next(iter(of_run.values()))[0].stage == "predictions" else "train"
        for method, value in agreement.add(image_id, split, masks).items():
            images[method][image_id] = value
    return images, agreement.pairs()


ONE, TWO = np.array([[1, 1]], np.uint8), np.array([[0, 1]], np.uint8)


def test_images_are_compared_among_the_runs_that_have_them_and_splits_apart(tmp_path: Path) -> None:
    write(tmp_path, "a", {"i <b>'ü": ONE, "j": ONE, "v": ONE})
    write(tmp_path, "b", {"i <b>'ü": ONE, "v": TWO})
    write(tmp_path, "c", {"i <b>'ü": TWO, "k": ONE, "v": TWO})
    images, pairs = agreement_of(tmp_path, ["a", "b", "c"])
    assert images["a"] == {"i <b>'ü": (0.625, 2), "v": (0.25, 2)}  # nobody else has j
    np.testing.assert_array_equal(pairs["train"], [[1, 1, 0.25], [1, 1, 0.25], [0.25, 0.25, 1]])
    np.testing.assert_array_equal(pairs["val"], [[1, 0.25, 0.25], [0.25, 1, 1], [0.25, 1, 1]])
    assert agreement_of(tmp_path, ["c", "a", "b"])[0] == images


def test_runs_of_other_photographs_are_refused_with_their_names(tmp_path: Path) -> None:
    write(tmp_path, "a", {"i": ONE})
    write(tmp_path, "b", {"i": ONE.T})
    with pytest.raises(ValueError, match=r"'i' is 1×2 in a\.h5, 2×1 in b\.h5.*dvc repro"):
        agreement_of(tmp_path, ["a", "b"])
    (tmp_path / "a.csv").write_text(",".join(rows.COLUMNS) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.h5 has a mask of 'i', which a\.csv lacks"):
        list(audits.images(tmp_path, ["a", "b"]))
    (tmp_path / "a.h5").unlink()
    with pytest.raises(store.StoreError, match=r"a\.h5"):
        list(audits.images(tmp_path, ["a", "b"]))


def test_memory_does_not_grow_with_the_masks(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        ids = [f"{at:05d}" for at in range(count)]
        for method in ("a", "b"):
            rng = np.random.default_rng(0)
            write(tmp_path, method, ((i, rng.integers(0, 3, (64, 64), np.uint8)) for i in ids))
            lines = "".join(f"{i},train,pseudo_masks,cat,0,,0.5,leak\n" for i in ids)
            (tmp_path / f"{method}.csv").write_text("id,split,stage,tags,truth,miou,score,reasons\n" + lines)
        tables = {method: image_table.ImageTable(["cat"]) for method in ("a", "b")}
        tracemalloc.start()
        audits.read(tmp_path, ["a", "b"], [], 5, tables)
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(10)
    assert peak(4500) - peak(2500) < 2000 * 2 * 50  # some 30 bytes a row; one mask alone has 4096


def test_small_masks_are_the_last_ones_and_the_same_bytes_however_the_work_is_cut(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)

    def written(name: str, size: int) -> bytes:
        tally = Tally.empty(3, SETTINGS.threshold_bins)
        chunks = (read.images[at : at + size] for at in range(0, len(read), size))
        items = add_batches((tally_batch(chunk, inputs) for chunk in chunks), tally)
        path = tmp_path / name
        store.write_part(
            path, store.SMALL_MASKS, items, labels=LABELS, part=0, parts=1, params_digest="", compression="gzip"
        )
        assert tally.images["pseudo_masks"] == 5 and tally.images["predictions"] == 3
        return path.read_bytes()

    assert written("a.h5", 3) == written("b.h5", 8)
    small = store.Store(tmp_path / "a.h5", store.SMALL_MASKS)
    small.require(record.id for record in read)
    masks, predictions = (
        store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS), store.Store(inputs.predictions, store.PREDICTIONS)
    )  # fmt: skip
    for record in read:
        full = predictions.read(record.id, "label") if record.split == "val" else masks.read(record.id, "mask")
        np.testing.assert_array_equal(small.read(record.id, "mask"), full)  # 64 px are small enough


def test_one_chunk_of_small_masks_is_in_memory_at_a_time() -> None:
    taken = []

    def batches() -> Iterator[BatchTally]:
        for at in range(3):
            taken.append(at)
            yield Tally.empty(2, 2), [(str(at), {"mask": ONE})]

    items = add_batches(batches(), Tally.empty(2, 2))
    assert next(items)[0] == "0" and taken == [0]
    assert [i for i, _ in items] == ["1", "2"]


def test_agreement_stands_beside_the_score_of_pseudo_masks_that_have_two_others() -> None:
    row = rows.Row("i", "pseudo_masks", 0.9, 0.25, (), 0.75, 2)
    assert (row.score_and_agreement, row.quality) == (0.5, 0.5)
    assert rows.Row("i", "pseudo_masks", 0.9, 0.25, (), 0.75, 1).quality == 0.25
    assert rows.Row("i", "predictions", 0.9, 0.25, (), 0.75, 2).quality == 0.25
    assert rows.Row("i", "pseudo_masks", 0.9, None, (), 0.75, 2).quality == 0.9
    assert rows.Row("i", "pseudo_masks", None, None, ()).quality is None


@pytest.mark.parametrize(
    ("methods", "told"),
    [(["a"], set()), (["a", "b"], {"method_agreement"}), (["a", "b", "c"], {"method_agreement", "score_and_agreement"})],
)
def test_the_page_tells_agreement_where_there_is_some(tmp_path: Path, methods: list[str], told: set[str]) -> None:
    text = page_case.write(tmp_path, ["=i", "<b>j", "k"], methods=methods, labels=LABELS).read_text(encoding="utf-8")
    assert {name for name in ("method_agreement", "score_and_agreement") if f'<option value="{name}">' in text} == told
    assert ("Agreement between methods" in text) == (len(methods) > 1)
    with (tmp_path / "report" / "review.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert all((row["method_agreement"] != "") == bool(told) for row in found) and len(found) == 3 * len(methods)


def test_the_page_shows_limits_counts_and_classes_that_change_beside_others(tmp_path: Path) -> None:
    labels = LabelSpace(("<i>cat", "d'og"))
    text = page_case.write(tmp_path, ["i", "j", "k"], labels=labels).read_text(encoding="utf-8")
    assert "≤ 0.625" in text and "≥ 0.375" in text
    assert '<th scope="row">&lt;i&gt;cat</th><td class="left">d&#39;og</td><td>7</td><td>25.0 %</td><td>12.5 %</td>' in text
