"""Segments voted by score maps: RLE, means, paint order, the file from outside and all that can be wrong with it,
superpixels."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refine_case as case
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from pipeline.core import config, store
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold
from pipeline.jobs import check
from pipeline.refiners.segments import reader, refiner, voting
from pipeline.refiners.segments.superpixels import superpixels
from tests.segments_case import masks_of, plain_rle, rle, section, write_folder, write_lines
from tests.toys import PROJECT, Toy

SOURCES = {
    "felzenszwalb": {"source": "felzenszwalb", "scale": 50.0, "sigma": 0.0, "min_size": 4},
    "slic": {"source": "slic", "n_segments": 12, "compactness": 10.0, "sigma": 0.0},
}
SIZES = st.tuples(st.integers(1, 14), st.integers(1, 14))
quick = hypothesis_settings(max_examples=60, deadline=None)


def fit_params(source: dict[str, Any], level: float = 0.4) -> refiner.FitParams:
    return config.parse(
        refiner.FitParams, {"threshold": {"rule": "fixed", "value": level}, "segments": source}, "fit_refiner"
    )


def maps_of(image_id: str, size: tuple[int, int], classes: Sequence[int] = (0,), seed: int = 0) -> ImageMaps:
    scores = np.random.default_rng(seed).random((len(classes), *size), np.float32)
    return ImageMaps(np.array(classes, np.int64), scores, size, id=image_id)


def fitted(source: dict[str, Any], maps: Sequence[ImageMaps], level: float = 0.4) -> dict[str, np.ndarray]:
    return refiner.fit(fit_params(source, level), iter(maps), lambda at: pytest.fail("fit needs no photograph"))


def made(state: dict[str, np.ndarray], **options: Any) -> refiner.Refiner:
    options = {"normalise": "minmax", "power": 1.0, "uncovered": "background"} | options
    return refiner.Refiner(config.parse(refiner.Params, options, "refine.cam.options"), state)


def refine_with(
    folder: Path, masks: Sequence[dict[str, Any]], maps: ImageMaps, level: float = 0.4, **options: Any
) -> np.ndarray:
    """f32[k+1,h,w] of one image from a file of its segments."""
    state = fitted(write_lines(folder / "segments.jsonl", {maps.id: masks}), [maps], level)
    return made(state, **options)(np.zeros((*maps.size, 3), np.uint8), maps, level)


@quick
@given(size=SIZES, seed=st.integers(0, 999))
def test_compressed_and_plain_run_lengths_hold_the_pixels_of_the_mask(size: tuple[int, int], seed: int) -> None:
    for mask in masks_of(np.random.default_rng(seed), size, 4):
        packed = rle(mask)["segmentation"]
        for told in (packed, plain_rle(packed)):
            runs = reader.run_lengths(told["counts"], mask.size)
            inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            np.testing.assert_array_equal(inside.reshape(size[::-1]).T, mask)


@given(
    runs=st.lists(st.integers(1, 2**23), min_size=1, max_size=9)
)  # with longer ones pycocotools 2.0.11 writes past its buffer
def test_long_runs_read_as_pycocotools_writes_them(runs: list[int]) -> None:
    counts = coco.frPyObjects({"size": [1, sum(runs)], "counts": runs}, 1, sum(runs))["counts"].decode("ascii")
    assert reader.run_lengths(counts, sum(runs)).tolist() == runs


@quick
@given(
    counts=st.one_of(
        st.text(max_size=12), st.lists(st.one_of(st.integers(), st.booleans(), st.none()), max_size=4), st.none()
    )
)
def test_counts_are_refused_by_a_value_error_or_fill_the_image(counts: Any) -> None:
    try:
        runs = reader.run_lengths(counts, 12)
    except ValueError:
        return
    assert runs.sum() == 12 and (runs >= 0).all()


@quick
@given(told=st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["annotations", "segmentation", "size", "counts", "level"]), inner, max_size=4),
    ),
))  # fmt: skip
def test_any_json_is_segments_or_a_value_error(told: Any) -> None:
    try:
        found = reader.segments_of(told)
    except ValueError:
        return
    assert len(found.runs) == len(found.levels)


@quick
@given(size=SIZES, k=st.integers(1, 3), seed=st.integers(0, 999))
def test_means_are_those_of_the_dense_product(size: tuple[int, int], k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random((k, *size), np.float32)
    masks = [mask for mask in masks_of(rng, size, 5) if mask.any()]
    dense = np.array([[plane[mask].mean(dtype=np.float64) for plane in scores] for mask in masks]).reshape(-1, k)
    found = voting.means_of_runs(scores, reader.segments_of([rle(mask) for mask in masks]).runs)
    np.testing.assert_allclose(found, dense, atol=1e-9)
    labels = rng.integers(0, 4, size)
    labels.flat[0] = 3
    found = voting.means_of_labels(scores, labels)
    for number in np.unique(labels):
        np.testing.assert_allclose(found[number], scores[:, labels == number].mean(axis=1, dtype=np.float64), atol=1e-9)


@pytest.mark.parametrize("power", [0.6, 1.0, 2.0])
def test_an_image_is_labelled_as_the_published_formula_written_out_does(tmp_path: Path, power: float) -> None:
    rng = np.random.default_rng(1)
    maps = maps_of("a", (11, 14), (1, 4))
    masks, levels = [rng.random(maps.size) < density for density in (0.3, 0.5, 0.1, 0.7)], [0, 1, 0, 1]
    found = refine_with(
        tmp_path, [rle(mask, level=level) for mask, level in zip(masks, levels, strict=True)], maps, power=power
    )
    gathered = np.stack([maps.scores * mask for mask in masks])  # s × k × h × w
    means = gathered.sum(axis=(2, 3)) / np.array([mask.sum() for mask in masks])[:, None]
    means = (means - means.min(axis=0)) / (np.ptp(means, axis=0) + 1e-7)
    voted = np.concatenate([(1 - means.max(axis=1, keepdims=True)) ** power, means], axis=1)
    label = np.zeros(maps.size, np.uint8)
    for at in sorted(range(4), key=lambda at: (levels[at], voted[at].max())):
        label[masks[at]] = (0, 2, 5)[voted[at].argmax()]
    np.testing.assert_array_equal(planes.labels_of(found, maps.classes), label)
    assert len(np.unique(label)) == 3


@quick
@given(size=SIZES, seed=st.integers(0, 999), data=st.data())
def test_each_pixel_shows_its_segment_of_highest_level_and_then_confidence(
    size: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    masks = [mask for mask in masks_of(np.random.default_rng(seed), size, 6) if mask.any()]
    levels = np.array([data.draw(st.integers(-1, 1)) for _ in masks], np.int64)
    confidence = np.array([data.draw(st.sampled_from([0.2, 0.5, 0.9])) for _ in masks])
    runs = reader.segments_of([rle(mask) for mask in masks]).runs
    canvas = voting.painted(runs, levels, confidence, size)
    rank = [(levels[at], confidence[at], -int(masks[at].sum())) for at in range(len(masks))]
    for y, x in np.ndindex(size):
        over = [at for at in range(len(masks)) if masks[at][y, x]]
        if over:
            assert masks[canvas[y, x]][y, x] and rank[canvas[y, x]] == max(rank[at] for at in over)
        else:
            assert canvas[y, x] == voting.ABSENT


def test_a_segment_of_background_overwrites_too(tmp_path: Path) -> None:
    maps = ImageMaps(np.array([0]), np.array([[[1, 1, 0, 0]]], np.float32), (1, 4), id="a")
    whole, dark = np.array([[1, 1, 1, 0]], bool), np.array([[0, 0, 1, 0]], bool)
    found = refine_with(tmp_path, [rle(dark, level=1), rle(whole)], maps)
    assert planes.labels_of(found, maps.classes).tolist() == [[1, 1, 0, 0]]


def test_a_single_segment_keeps_its_mean_where_min_max_has_no_spread(tmp_path: Path) -> None:
    maps = ImageMaps(np.array([0]), np.full((1, 2, 2), 0.9, np.float32), (2, 2), id="a")
    found = refine_with(tmp_path, [rle(np.ones((2, 2), bool))], maps)
    np.testing.assert_allclose(found[1], 0.9)


@given(level=st.floats(threshold.LOWEST, threshold.HIGHEST))
def test_without_a_power_a_segment_is_background_unless_its_best_class_exceeds_the_level(level: float) -> None:
    power = voting.power_at(level)
    voted = voting.votes(np.array([[level - 1e-6], [level + 1e-6]]), normalise="none", power=power)
    assert voted.argmax(axis=1).tolist() == [0, 1]


@given(power=st.floats(0.3, 5), low=st.floats(0.05, 0.4), high=st.floats(0.41, 0.95))
def test_a_given_power_holds_at_the_fitted_level_and_a_higher_level_means_more_background(
    power: float, low: float, high: float
) -> None:
    source = SOURCES["slic"]
    found = [made(fitted(source, [], low), power=power, normalise="none").power(level) for level in (low, high)]
    assert found[0] == pytest.approx(power) and found[1] < found[0]


def test_pixels_in_no_segment_are_background_or_what_the_score_maps_say(tmp_path: Path) -> None:
    maps = ImageMaps(np.array([2]), np.array([[[1, 0, 0.6, 0.3]]], np.float32), (1, 4), id="a")
    masks = [rle(np.array([[1, 0, 0, 0]], bool)), rle(np.array([[0, 1, 0, 0]], bool))]
    assert planes.labels_of(refine_with(tmp_path, masks, maps), maps.classes).tolist() == [[3, 0, 0, 0]]
    found = refine_with(tmp_path, masks, maps, uncovered="scores")
    assert planes.labels_of(found, maps.classes).tolist() == [[3, 0, 3, 0]]
    np.testing.assert_allclose(found[:, 0, 2], [0.4, 0.6])


def test_an_image_without_a_segment_is_wholly_uncovered(tmp_path: Path) -> None:
    maps = ImageMaps(np.array([2]), np.array([[[1, 0]]], np.float32), (1, 2), id="a")
    for masks in ([], [rle(np.zeros((1, 2), bool))] * 2):
        assert refine_with(tmp_path, masks, maps)[0].tolist() == [[1, 1]]


def test_an_empty_segment_does_not_move_the_others(tmp_path: Path) -> None:
    maps = ImageMaps(np.array([2]), np.array([[[0.9, 0.7]]], np.float32), (1, 2), id="a")
    masks = [rle(np.array([[1, 0]], bool)), rle(np.array([[0, 1]], bool))]
    one, two = (refine_with(tmp_path, [*masks, *more], maps) for more in ([], [rle(np.zeros((1, 2), bool))]))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("source", SOURCES)
@hypothesis_settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_only_classes_of_the_image_ever_appear_and_a_superpixel_has_one_label(source: str, data: st.DataObject) -> None:
    classes = sorted(data.draw(st.sets(st.integers(0, 19), min_size=1, max_size=4)))
    maps = maps_of("", data.draw(SIZES), classes, data.draw(st.integers(0, 99)))
    image = np.random.default_rng(len(classes)).integers(0, 256, (*maps.size, 3), dtype=np.uint8)
    normalise, uncovered = (
        data.draw(st.sampled_from(["minmax", "none"])),
        data.draw(st.sampled_from(["background", "scores"])),
    )
    refine = made(fitted(SOURCES[source], []), normalise=normalise, uncovered=uncovered, power=None)
    found = refine(image, maps, data.draw(st.floats(0.02, 0.98)))
    assert found.shape == (len(classes) + 1, *maps.size) and found.dtype == np.float32
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    labels = planes.labels_of(found, maps.classes)
    assert set(np.unique(labels).tolist()) <= {0, *(one + 1 for one in classes)}
    parts = superpixels(image, fit_params(SOURCES[source]).segments)  # type: ignore[arg-type]
    for number in np.unique(parts):
        assert len(np.unique(labels[parts == number])) == 1


@pytest.mark.parametrize("source", SOURCES)
def test_superpixels_mend_the_border_of_a_blurred_score_map(source: str) -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[:, :20, 0], image[:, 20:, 1] = 220, 160
    ramp = np.broadcast_to(np.clip(np.linspace(1.2, 0, 40, dtype=np.float32), 0, 1), (1, 40, 40))  # crosses 0.4 at column 26
    maps = ImageMaps(np.array([0]), ramp, (40, 40))
    found = made(fitted(SOURCES[source], []), power=None)(image, maps, 0.4)
    np.testing.assert_array_equal(planes.labels_of(found, maps.classes)[:, [0, 19, 20, 39]], [[1, 1, 0, 0]] * 40)


def test_a_file_of_superpixels_does_what_superpixels_do(tmp_path: Path) -> None:
    image = np.kron(np.random.default_rng(5).integers(0, 256, (3, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    maps = ImageMaps(np.array([0, 3]), np.random.default_rng(6).random((2, 3, 4), np.float32), image.shape[:2], id="a")
    parts = superpixels(image, fit_params(SOURCES["slic"]).segments)  # type: ignore[arg-type]
    source = write_lines(tmp_path / "all.jsonl", {"a": [rle(parts == number) for number in np.unique(parts)]})
    one, two = (made(fitted(given, [maps]), power=None)(image, maps, 0.3) for given in (SOURCES["slic"], source))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert len(np.unique(parts)) > 5 and set(np.unique(planes.labels_of(one, maps.classes))) == {0, 1, 4}


def three(rng: np.random.Generator) -> tuple[list[ImageMaps], dict[str, list[dict[str, Any]]]]:
    maps = [maps_of("b/2", (6, 5), (0, 1)), maps_of("a 1", (4, 7)), maps_of("größe", (3, 3)), maps_of("tagless", (5, 5), ())]
    return maps, {one.id: [rle(mask) for mask in masks_of(rng, one.size, 4)] for one in maps if len(one.classes)}


def test_a_folder_and_a_file_of_lines_and_whole_records_are_the_same_segments(tmp_path: Path) -> None:
    maps, images = three(np.random.default_rng(2))
    sources = [
        write_lines(tmp_path / "all.jsonl", images),
        write_lines(tmp_path / "more.jsonl", {"z": [], **dict(reversed(images.items()))}),
        write_folder(tmp_path / "sam", images),
        write_folder(
            tmp_path / "sa-1b", {one: {"image": {"width": 1}, "annotations": listed} for one, listed in images.items()}
        ),
    ]
    plain = {one: [mask | {"segmentation": plain_rle(mask["segmentation"])} for mask in images[one]] for one in images}
    found = []
    for source in [*sources, write_lines(tmp_path / "plain.jsonl", plain)]:
        refine = made(fitted(source, maps))
        found.append([refine(np.zeros((*one.size, 3), np.uint8), one, 0.4) for one in maps[:3]])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_hidden_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    maps, images = three(np.random.default_rng(2))
    write_folder(tmp_path / "sam", images)
    (tmp_path / "sam" / "._a 1.json").write_bytes(b"\0")
    assert made(fitted(section(tmp_path / "sam"), maps)).index.keys() == images.keys()


def test_all_that_is_wrong_with_a_file_is_told_at_once(tmp_path: Path) -> None:
    full = rle(np.ones((3, 3), bool))

    def spoilt(**changes: Any) -> dict[str, Any]:
        return full | {"segmentation": full["segmentation"] | changes}

    bad: dict[str, tuple[Any, str]] = {
        "letters": ([full, spoilt(counts="no RLE!")], "segment 1: counts is no compressed COCO RLE"),
        "cut off": ([spoilt(counts=full["segmentation"]["counts"][:-1])], "do not fill the 9 pixels"),
        "short": ([spoilt(counts=[0, 8])], "do not fill the 9 pixels"),
        "endless": ([spoilt(counts="oooooooooooooo0")], "a run is too long"),
        "polygon": ([full | {"segmentation": [[0, 0, 1, 1, 2, 2]]}], "segment 0 is no mapping with segmentation"),
        "size": ([rle(np.ones((4, 3), bool))], r"segments of 4 × 3 px, but the image has 3 × 3"),
        "sizes": ([full, rle(np.ones((4, 3), bool))], "differ in size"),
        "float size": ([spoilt(size=[3.0, 3])], r"size is \[3.0, 3\]"),
        "level": ([full | {"level": "whole"}], "level is 'whole'"),
        "mapping": ({"masks": []}, "no list of segments"),
        "../up": (None, "no segments of this image"),
        "elsewhere": (None, "no segments of this image"),
    }
    maps = [maps_of(one, (3, 3)) for one in ["fine", *bad]]
    images = {one: told for one, (told, _) in bad.items() if told is not None} | {"fine": [full], "val_7": [full]}
    (tmp_path / "up.json").write_text(json.dumps([full]))
    lines = "".join(
        json.dumps({"id": one, **(told if isinstance(told, dict) else {"annotations": told})}) + "\n"
        for one, told in images.items()
    )
    (tmp_path / "all.jsonl").write_text(
        lines + '\n{"annotations": []}\n{"id": 7, "annotations": []}\n{"id":\n' + lines.splitlines()[0]
    )
    for source in (write_folder(tmp_path / "sam", images), section(tmp_path / "all.jsonl")):
        with pytest.raises(ValueError) as caught:
            fitted(source, maps)
        text = str(caught.value)
        for one, (_, words) in bad.items():
            assert any(repr(one) in line and re.search(words, line) for line in text.splitlines()), (one, text)
        assert "'fine'" not in text and "it has 'val_7'" in text and "<id>.json" in text
    for words in ("line 14: `id` must be a text, got None", "got 7", "no JSON", "'letters' was there before"):
        assert words in text, (words, text)


def test_a_long_list_of_problems_is_cut_and_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "all.jsonl", {})
    with pytest.raises(ValueError, match=r"(?s)50 problems.*and 30 more"):
        fitted(source, [maps_of(f"{number}", (2, 2)) for number in range(50)])


def test_an_image_without_a_class_needs_no_segments(tmp_path: Path) -> None:
    assert made(fitted(write_lines(tmp_path / "all.jsonl", {}), [maps_of("tagless", (5, 5), ())])).index == {}


@pytest.mark.parametrize("source", ["felzenszwalb", "slic", "file"])
def test_the_label_free_level_is_that_of_the_score_maps(tmp_path: Path, source: str) -> None:
    rng = np.random.default_rng(0)
    maps = [
        ImageMaps(np.array([0]), case.scores_of(rng, 1, (32, 32)).astype(np.float32), (32, 32), id=f"{at}")
        for at in range(9)
    ]
    lines = write_lines(tmp_path / "all.jsonl", {one.id: [] for one in maps})
    params = config.parse(
        refiner.FitParams,
        {"threshold": {"rule": "otsu", "factor": 1.0}, "segments": SOURCES.get(source, lines)},
        "fit_refiner",
    )
    assert (
        refiner.fit(params, iter(maps), lambda at: np.zeros(0))["threshold"]
        == threshold.fit(params.threshold, maps)["threshold"]
    )


def test_another_file_than_the_one_meant_is_refused_and_the_digest_to_write_is_told(tmp_path: Path) -> None:
    maps, images = three(np.random.default_rng(2))
    for source in (write_lines(tmp_path / "all.jsonl", images), write_folder(tmp_path / "sam", images)):
        for call in (lambda params: refiner.check(params), lambda params: refiner.fit(params, maps, lambda at: np.zeros(0))):
            call(fit_params(source))
            with pytest.raises(ValueError, match=source["sha256"]):
                call(fit_params(source | {"sha256": "0" * 64}))
            with pytest.raises(ValueError, match=r"segments\.path"):
                call(fit_params(source | {"path": str(tmp_path / "nowhere")}))


def test_a_file_that_has_changed_since_the_fit_is_never_read(tmp_path: Path) -> None:
    maps, images = three(np.random.default_rng(2))
    image = np.zeros((*maps[0].size, 3), np.uint8)
    for source in (write_lines(tmp_path / "all.jsonl", images), write_folder(tmp_path / "sam", images)):
        refine = made(fitted(source, maps))
        refine(image, maps[0], 0.4)
        path = Path(source["path"])
        path = path / "b" / "2.json" if path.is_dir() else path
        path.write_bytes(path.read_bytes().replace(b"0.95", b"0.94"))
        with pytest.raises(ValueError, match="have changed since"):
            refine(image, maps[0], 0.4)


def test_an_image_that_the_fit_has_not_seen_is_refused(tmp_path: Path) -> None:
    maps, images = three(np.random.default_rng(2))
    refine = made(fitted(write_folder(tmp_path / "sam", images), maps))
    for strange in ("", "../all", "/etc/passwd", "tagless"):
        with pytest.raises(ValueError, match="not among the images"):
            refine(np.zeros((3, 3, 3), np.uint8), maps_of(strange, (3, 3)), 0.4)


def test_the_state_holds_a_place_and_a_digest_per_image_but_no_segments(tmp_path: Path) -> None:
    size = (64, 64)
    maps = [maps_of(f"{number:03d}", size) for number in range(8)]
    small, large = (
        fitted(write_lines(tmp_path / "all.jsonl", {one.id: [rle(np.eye(64) > 0)] * count for one in maps}), maps)
        for count in (1, 50)
    )
    assert {name: value.nbytes for name, value in small.items()} == {name: value.nbytes for name, value in large.items()}


def lines_for_case(path: Path) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    return write_lines(path, {one: [rle(mask) for mask in masks_of(rng, size, 5)] for one, size, _, _ in case.IMAGES})


def test_the_stages_write_the_same_bytes_with_one_and_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    outs = []
    for workers in ("1", "2"):
        case.build(
            tmp_path / workers, refiner="segments", disagree_at=[0.2, 2.0], segments=lines_for_case(tmp_path / "all.jsonl")
        )
        monkeypatch.chdir(tmp_path / workers)
        monkeypatch.setenv("TAG2MASK_WORKERS", workers)
        case.run_well("fit_refiner", "refine")
        outs.append(case.contents(Path("out")))
    assert outs[0] == outs[1]
    refined = store.Store(Path("out/refined"), store.REFINED)
    assert any(fields["label"].any() for _, fields in refined) and any(fields["disagree"].any() for _, fields in refined)


def test_check_refuses_a_file_that_is_not_there_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy = Toy(tmp_path / "raw")
    toy.params["methods"]["cam"]["refiner"] = "segments"
    toy.recipes["cam"]["fit_refiner"]["segments"] = lines_for_case(tmp_path / "all.jsonl")
    toy.recipes["cam"]["refine"]["options"] = case.SEGMENTS
    toy.write(tmp_path)
    assert check.problems() == []
    (tmp_path / "all.jsonl").unlink()
    assert [problem for problem in check.problems() if "segments.path: there is no file or folder" in problem]


def test_a_source_with_keys_of_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(config.ParamsError) as error:
        fit_params(SOURCES["slic"] | {"scale": 1.0})
    line = "params.yaml: fit_refiner.segments.scale: unknown key, allowed are source, n_segments, compactness, sigma"
    assert str(error.value) == f"{line}\n(edit params.yaml)"


def test_neither_torch_nor_skimage_is_imported_where_a_file_is_read() -> None:
    unwanted = "{'torch', 'skimage', 'pycocotools'}"
    text = f"import sys, pipeline.refiners.segments.refiner; sys.exit(bool({unwanted} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", text], cwd=PROJECT, check=False).returncode == 0
