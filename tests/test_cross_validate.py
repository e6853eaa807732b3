"""Stage cross_validate: folds, the soft-min score, and segmenters that never saw what they are asked about."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from pipeline import runtime
from pipeline.core import records, store
from pipeline.core.config import ParamsError
from pipeline.core.labels import IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.imaging import planes
from pipeline.jobs import cross_validate, segment, train
from pipeline.training import loop
from stages import cross_validate as stage
from tests.test_segment import Colours
from tests.toys import SCRATCH, Toy, toy_image

LABELS = LabelSpace(("disc", "square"))
IDS = st.lists(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=2, max_size=40, unique=True
)


@hypothesis(max_examples=100, deadline=None)
@given(IDS, st.integers(2, 9), st.randoms())
def test_folds_are_disjoint_cover_all_are_even_and_do_not_depend_on_the_order(ids: list[str], folds: int, rng: Any) -> None:
    found = cross_validate.folds_of(ids, folds)
    assert len(found) == folds and sorted(one for fold in found for one in fold) == sorted(ids)
    assert max(map(len, found)) - min(map(len, found)) <= 1
    shuffled = list(ids)
    rng.shuffle(shuffled)
    assert cross_validate.folds_of(shuffled, folds) == found


def test_the_folds_of_some_ids_are_these_on_every_host() -> None:
    assert cross_validate.folds_of(["a", "b", "c", "ü x", "../d"], 2) == [["a", "b", "c"], ["../d", "ü x"]]


@hypothesis(max_examples=100, deadline=None)
@given(arrays(np.float32, st.integers(1, 30), elements=st.floats(0, 1, width=32)), st.floats(0.05, 5))
def test_the_soft_min_is_the_sum_of_the_probabilities_by_a_softmax_of_what_they_lack(
    s: np.ndarray, temperature: float
) -> None:
    exponents = [np.exp((1 - float(one)) / temperature) for one in s]
    expected = sum(float(one) * weight / sum(exponents) for one, weight in zip(s, exponents, strict=True))
    assert cross_validate.soft_min(s, temperature) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_low_temperature_gives_the_least_probability_and_a_high_one_the_mean() -> None:
    s = np.array([0.0, 0.2, 1.0])
    assert cross_validate.soft_min(s, 1e-6) == 0.0 and cross_validate.soft_min(s[1:], 1e-6) == pytest.approx(0.2)
    assert cross_validate.soft_min(s, 1e6) == pytest.approx(0.4)
    assert np.isnan(cross_validate.soft_min(s[:0], 0.1))


def test_pixels_of_255_do_not_count_and_a_mask_of_nothing_else_has_no_figure() -> None:
    found = np.array([[[0.9, 0.2]], [[0.1, 0.5]], [[0.0, 0.3]]], np.float32)
    both = cross_validate.compare(found, np.array([[0, 2]], np.uint8), 1e6)
    assert both["soft_min"] == pytest.approx((0.9 + 0.3) / 2) and both["held_out_agreement"] == pytest.approx(
        (1 + 0 + 0) / 3
    )
    first = cross_validate.compare(found, np.array([[0, IGNORE]], np.uint8), 0.1)
    assert (first["soft_min"], first["held_out_agreement"]) == (pytest.approx(0.9), 1.0)
    none = cross_validate.compare(found, np.full((1, 2), IGNORE, np.uint8), 0.1)
    assert np.isnan(none["soft_min"]) and np.isnan(none["held_out_agreement"])


def test_a_mask_is_brought_to_a_smaller_canvas_by_its_nearest_pixels() -> None:
    mask = np.repeat(np.repeat(np.array([[0, 1], [255, 2]], np.uint8), 3, axis=0), 5, axis=1)
    assert (planes.nearest(mask, (2, 2)) == [[0, 1], [255, 2]]).all()
    assert planes.nearest(mask, (1, 1)).shape == (1, 1)


@given(st.integers(1, 600), st.integers(1, 600))
def test_each_pixel_of_a_resized_mask_is_the_one_under_its_centre_and_of_two_the_later(old: int, new: int) -> None:
    row = planes.nearest(np.arange(old)[None], (1, new))[0]
    assert row.tolist() == [math.floor(Fraction((2 * at + 1) * old, 2 * new)) for at in range(new)]


def masks_of(folder: Path, items: dict[str, np.ndarray]) -> None:
    store.write_part(
        store.part_path(folder, 0), store.PSEUDO_MASKS, ((one, {"mask": items[one]}) for one in sorted(items)),
        labels=LABELS,
        part=0, parts=1, params_digest="", compression="gzip",
    )  # fmt: skip


def build(root: Path, *, count: int = 7, swapped: int | None = None, **retrain: Any) -> Toy:
    """Toy images with true masks as pseudo-masks, one of them with its classes swapped, one all 255 if none is; their
    params."""
    (root / "raw").mkdir()
    found, masks = [], {}
    for index in range(count):
        image, mask, _ = toy_image(index)
        path, image_id = root / "raw" / f"{index}.png", f"{index} <b>'ü ../"
        Image.fromarray(image).save(path)
        digest = hashlib.sha256(path.read_bytes()).digest()
        found.append(ImageRecord(image_id, path.name, mask.shape, "train", (0, 1), digest))
        masks[image_id] = np.array([0, 2, 1], np.uint8)[mask] if index == swapped else mask
    if swapped is None:
        masks[found[-1].id][:] = IGNORE
    records.write(root / "records.h5", Records(LABELS, tuple(found), ()))
    masks_of(root / "masks", masks)
    toy = Toy(root / "raw")
    toy.recipes["cam"]["cross_validate"]["folds"] = 2
    toy.recipes["cam"]["retrain"]["schedule"] |= retrain
    toy.write(root)
    return toy


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.setenv("TAG2MASK_RANKS", "1")
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    yield tmp_path


def run(out: str = "held_out.h5") -> Result:
    words = ["cam", "--records", "records.h5", "--pseudo-masks", "masks", "--init", str(SCRATCH), "--held-out", out]
    return CliRunner().invoke(stage.main, words)


def test_an_image_that_is_held_out_trains_no_segmenter_that_is_asked_about_it(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(project)
    trained: list[set[str]] = []
    real = loop.train

    def seen(job: loop.Job, launch: loop.Launch | None) -> loop.Training:
        drawn = job.images.records
        trained.append({record.id for record in drawn})
        return real(job, launch)

    asked: list[tuple[str, set[str]]] = []
    score = cross_validate.score_part

    def scored(item: Any, job: cross_validate.Job) -> int:
        asked.append((job.segment.weights.name, {record.id for record in item[1]}))
        return score(item, job)

    monkeypatch.setattr(loop, "train", seen)
    monkeypatch.setattr(cross_validate, "score_part", scored)
    assert run().exit_code == 0
    everything = set(records.read(project / "records.h5").by_id())
    assert len(trained) == 2 and {len(one) for one in trained} == {3, 4} and trained[0] | trained[1] == everything
    told: set[str] = set()
    for weights, ids in asked:
        assert not ids & trained[int(weights[5])]  # fold-0.safetensors
        told |= ids
    assert told == everything


def test_every_image_with_a_mask_has_its_figures_and_one_of_255_has_nan(project: Path) -> None:
    build(project)
    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    found = store.Store(project / "held_out.h5", store.HELD_OUT)
    assert len(found) == 7 and found.labels == LABELS
    blank = found[found.ids[-1]]
    assert np.isnan(blank["soft_min"]).all() and np.isnan(blank["held_out_agreement"]).all()
    rest = np.stack([[found[one][name][0] for name in ("soft_min", "held_out_agreement")] for one in found.ids[:-1]])
    assert ((rest >= 0) & (rest <= 1)).all()
    assert not list((project / ".work").iterdir())


def test_without_folds_the_store_holds_no_image_and_nothing_is_trained(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = build(project)
    toy.recipes["cam"]["cross_validate"]["folds"] = 0
    toy.write(project)
    monkeypatch.setattr(train, "job", lambda *_, **__: pytest.fail("trained"))
    assert run().exit_code == 0
    assert len(store.Store(project / "held_out.h5", store.HELD_OUT)) == 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"folds": 8},
            "cross_validate.folds: got 8, allowed is 0 (off) or 2 up to the number of images with a pseudo-mask, 7",
        ),
        ({"folds": 1}, "cross_validate: folds: got 1, allowed is 0 (off) or a whole number >= 2"),
        ({"folds": -1}, "cross_validate.folds: got -1"),
        ({"temperature": 0}, "cross_validate.temperature: got 0"),
    ],
)
def test_wrong_params_are_told_before_anything_is_trained(
    project: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], told: str
) -> None:
    toy = build(project)
    toy.recipes["cam"]["cross_validate"] |= change
    toy.write(project)
    monkeypatch.setattr(loop, "train", lambda *_: pytest.fail("trained"))
    result = run()
    assert result.exit_code == 1 and f"recipes/cam.yaml: {told}" in result.output


def test_a_run_that_was_killed_in_its_second_fold_keeps_the_first(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(project)
    assert run("undisturbed.h5").exit_code == 0
    trained: list[int] = []
    scored: list[tuple[str, int]] = []
    real, score = loop.train, cross_validate.score_part

    def training(job: loop.Job, launch: loop.Launch | None) -> loop.Training:
        trained.append(len(job.images))
        return real(job, launch)

    def dying(item: Any, job: cross_validate.Job) -> int:
        name = job.segment.out.name
        scored.append((name, item[0]))
        if scored.count(("fold-1", 1)) == 1 and name == "fold-1" and item[0] == 1:
            raise ValueError("killed")
        return score(item, job)

    monkeypatch.setattr(loop, "train", training)
    monkeypatch.setattr(cross_validate, "score_part", dying)
    assert "killed" in run().output and not (project / "held_out.h5").exists()
    assert run().exit_code == 0
    assert trained == [3, 4]  # of seven images: the first fold holds four out, the second three
    assert scored == [("fold-0", 0), ("fold-0", 1), ("fold-1", 0), ("fold-1", 1), ("fold-1", 1)]
    assert (project / "held_out.h5").read_bytes() == (project / "undisturbed.h5").read_bytes()
    assert not list((project / ".work").iterdir())


def test_another_training_or_temperature_does_not_pick_up_what_a_killed_run_left(project: Path) -> None:
    toy = build(project)
    whole = {}
    for name, change in (("as it is", {}), ("longer", {"epochs": 2})):
        toy.recipes["cam"]["retrain"]["schedule"] |= change
        whole[name] = train.job(
            toy.settings(), "segmenters", records=Path("records.h5"), init=SCRATCH, masks=Path("masks"), engine=runtime
        )[0]
    file = toy.settings().file
    works = [fold.training.work for job in whole.values() for fold in cross_validate.plan(job, 2, file)]
    works += [fold.training.work for fold in cross_validate.plan(whole["longer"], 3, file)]
    assert len({*works, *(job.work for job in whole.values())}) == 9
    with pytest.raises(ParamsError, match="got 99"):
        cross_validate.plan(whole["longer"], 99, file)


def test_a_mislabelled_image_is_believed_least(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(project, count=8, swapped=5, epochs=0)
    monkeypatch.setattr(segment, "load", lambda *_: Colours())  # a segmenter that has learned what the other masks say
    result = run()
    assert result.exit_code == 0, (result.output, result.exception)
    found = store.Store(project / "held_out.h5", store.HELD_OUT)
    for name in ("soft_min", "held_out_agreement"):
        wrong, *others = sorted((float(found[one][name][0]), one) for one in found.ids)
        assert wrong[1].startswith("5 ") and wrong[0] < others[0][0] - 0.2, name
