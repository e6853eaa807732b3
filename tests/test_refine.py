"""fit_refiner and refine: thresholds, both refiners, workers, resuming."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import refine_case as case
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import config, plugins, refiner_state, store
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)


def refiner_of(name: str):
    module = plugins.load("refiners", name)
    return module.Refiner(
        config.parse(module.Params, case.OPTIONS[name], "options"), {"threshold": np.array([0.4], np.float32)}
    )


def test_a_fixed_level_comes_out_as_it_is_and_reads_no_map() -> None:
    state = threshold.fit(threshold.FixedThreshold("fixed", 0.3), (1 / 0 for _ in "a"))  # type: ignore[arg-type]
    assert state["threshold"].tolist() == [np.float32(0.3)]


def test_the_label_free_level_lies_between_dark_ground_and_bright_objects() -> None:
    rng = np.random.default_rng(0)
    maps = (ImageMaps(np.array([0]), case.scores_of(rng, 1, (64, 64)).astype(np.float32), (64, 64)) for _ in range(20))
    assert 0.15 < threshold.fit(threshold.OtsuThreshold("otsu", 1.0), maps)["threshold"][0] < 0.75


def test_the_order_of_the_images_does_not_move_the_label_free_level() -> None:
    rng = np.random.default_rng(0)
    maps = [ImageMaps(np.array([0]), case.scores_of(rng, 1, (32, 32)).astype(np.float32), (32, 32)) for _ in range(9)]
    otsu = threshold.OtsuThreshold("otsu", 1.0)
    assert threshold.fit(otsu, maps) == threshold.fit(otsu, maps[::-1])


def test_no_class_in_any_image_is_an_error_that_says_what_to_set() -> None:
    none = ImageMaps(np.zeros(0, np.int64), np.zeros((0, 4, 4), np.float32), (16, 16))
    with pytest.raises(ValueError, match="fixed"):
        threshold.fit(threshold.OtsuThreshold("otsu", 1.0), [none])


def test_the_state_has_the_same_bytes_twice_and_belongs_to_its_refiner(tmp_path: Path) -> None:
    state = {"z": np.ones(3, np.float32), "threshold": np.array([0.4], np.float32)}
    refiner_state.write(tmp_path / "a", "crf", state)
    refiner_state.write(tmp_path / "b", "crf", dict(reversed(state.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert refiner_state.read(tmp_path / "a", "crf")["threshold"] == np.float32(0.4)
    with pytest.raises(ValueError, match="crf"):
        refiner_state.read(tmp_path / "a", "none")


@pytest.mark.parametrize("name", ["none", "crf", "par", "walk"])
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_only_classes_of_the_image_ever_appear(name: str, data: st.DataObject) -> None:
    classes = np.array(sorted(data.draw(st.sets(st.integers(0, 19), min_size=1, max_size=4))))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.random((len(classes), -(-size[0] // 4), -(-size[1] // 4)), np.float32)
    maps = ImageMaps(classes, scores, size, case.affinity_of(rng, size).astype(np.float32), case.grid_of(size))
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = refiner_of(name)(image, maps, data.draw(st.floats(0.02, 0.98)))
    assert found.shape == (len(classes) + 1, *size)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert set(np.unique(planes.labels_of(found, maps.classes)).tolist()) <= {0, *(classes + 1).tolist()}


def test_without_a_refiner_a_pixel_is_background_unless_its_score_exceeds_the_level() -> None:
    maps = ImageMaps(np.array([4]), np.array([[[0.2, 0.4, 0.6]]], np.float32), (1, 3))
    found = refiner_of("none")(np.zeros((1, 3, 3), np.uint8), maps, float(np.float32(0.4)))
    assert planes.labels_of(found, maps.classes).tolist() == [[0, 0, 5]]


def test_train_images_alone_are_refined_and_those_without_classes_are_certain_background(tmp_path: Path) -> None:
    case.build(tmp_path, disagree_at=[0.5, 1.5])
    case.run_well("fit_refiner", "refine")
    refined = store.Store(Path("out/refined"), store.REFINED)
    refined.require(image_id for image_id, _, split, _ in case.IMAGES if split == "train")
    tagless = refined["tagless"]
    assert (tagless["label"] == 0).all() and (tagless["confidence"] == 255).all() and not tagless["disagree"].any()
    assert refined["one pixel"]["label"].shape == (1, 1)
    assert any(fields["disagree"].any() for _, fields in refined)
    assert not Path(".work").exists() or not any(Path(".work").iterdir())


def test_without_disagree_at_nothing_disagrees(tmp_path: Path) -> None:
    case.build(tmp_path, refiner="none")
    case.run_well("fit_refiner", "refine")
    assert not any(fields["disagree"].any() for _, fields in store.Store(Path("out/refined"), store.REFINED))


def test_three_workers_that_decode_ahead_write_the_bytes_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outs = []
    for workers, loaders in (("1", "0"), ("3", "2")):
        case.build(tmp_path / workers, disagree_at=[0.7, 1.3], formats=["hdf5", "voc_png"])
        monkeypatch.chdir(tmp_path / workers)
        monkeypatch.setenv("TAG2MASK_WORKERS", workers)
        monkeypatch.setenv("TAG2MASK_LOADERS", loaders)
        case.run_well("fit_refiner", "refine", "export")
        outs.append(case.contents(Path("out")))
    assert outs[0] == outs[1] and "refined/part-00002.h5" in outs[0]


def test_a_crash_keeps_finished_parts_and_the_next_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    case.build(tmp_path)
    case.run_well("fit_refiner", "refine")
    undisturbed = case.contents(Path("out/refined"))
    last = Path("raw/5.png")  # "untagged", in the last part
    good = last.read_bytes()
    last.write_bytes(good + b"x")
    assert case.run("refine").exit_code != 0
    finished = {path.name: path.stat().st_mtime_ns for path in Path(".work").rglob("part-*.h5")}
    assert sorted(finished) == ["part-00000.h5", "part-00001.h5"]
    last.write_bytes(good)
    case.run_well("refine")
    assert case.contents(Path("out/refined")) == undisturbed
    assert {name: (Path("out/refined") / name).stat().st_mtime_ns for name in finished} == finished


def test_a_state_of_another_refiner_is_refused(tmp_path: Path) -> None:
    case.build(tmp_path)
    case.run_well("fit_refiner")
    case.write_settings(tmp_path, refiner="none")
    result = case.run("refine")
    assert result.exit_code == 1 and "was fitted for refiner 'crf', not 'none'" in result.output


def test_the_stages_import_no_torch() -> None:
    names = "stages.fit_refiner, stages.refine, stages.export, pipeline.refiners.crf.refiner, pipeline.refiners.none.refiner"
    text = f"import sys, {names}, pipeline.exporters.voc_png, pipeline.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], cwd=Path(__file__).parents[1], check=False).returncode == 0
