"""One real `dvc repro` on toys, in a copy of the project: what runs, what runs again, and what comes out."""

from __future__ import annotations

import copy
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import store
from pipeline.readers import PseudoMasks
from tests.project_copy import WEIGHTS, Copy, environment
from tests.toys import PROJECT, Toy

STAGES = (
    "train",
    "extract",
    "fit_refiner",
    "refine",
    "export",
    "cross_validate",
    "retrain",
    "segment",
    "relabel",
    "evaluate",
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("project") / "copy")
    assert copy.ran() == ["prepare", *(f"{stage}@cam" for stage in STAGES), "report"]
    return copy


def test_a_full_run_leaves_masks_metrics_and_a_report(done: Copy) -> None:
    masks = PseudoMasks(done.folder / "artifacts/cam/pseudo_masks")
    assert len(masks) == 9 and masks.labels.names == ("disc", "square")
    stages = {"score_maps", "refined", "pseudo_masks", "relabelled", "score_maps_val", "predictions"}
    figures = json.loads((done.folder / "audit/cam.json").read_text(encoding="utf-8"))
    assert figures["truth"] and set(figures["stages"]) == stages
    metrics = json.loads((done.folder / "metrics/cam.json").read_text(encoding="utf-8"))
    assert set(metrics["miou"]) == stages and metrics["supervision"] == "tags"
    page = (done.folder / "report/index.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64" in page and "http://" not in page and "https://" not in page
    assert not list((done.folder / ".work").glob("*"))


def test_extract_measures_view_agreement_and_the_audit_has_it_for_every_image(done: Copy) -> None:
    maps = store.Store(done.folder / "artifacts/cam/scoremaps", store.SCORE_MAPS).column("agreement")
    assert len(maps) == 12 and all(((values >= 0) & (values <= 1)).all() for values in maps.values())
    with (done.folder / "audit/cam.csv").open(encoding="utf-8", newline="") as file:
        indicators = {row["id"]: row["view_agreement"] for row in csv.DictReader(file) if row["stage"] == "pseudo_masks"}
    assert len(indicators) == 9 and all(
        float(value) == pytest.approx(maps[image_id].astype(np.float64).mean(), abs=1e-5)
        for image_id, value in indicators.items()
    )


def test_a_second_run_runs_nothing(done: Copy) -> None:
    assert done.ran() == []


def test_status_says_that_all_is_done_and_after_a_change_of_params_what_will_run(done: Copy) -> None:
    command = [sys.executable, "-m", "stages.status"]

    def lines() -> list[str]:
        shown = subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, text=True, check=True)
        return shown.stdout.splitlines()

    assert lines()[-1] == "everything is up to date"
    title, done.toy.params["report"]["title"] = done.toy.params["report"]["title"], "Another"
    done.toy.write(done.folder)
    assert "report: report of params.yaml modified" in lines()
    done.toy.params["report"]["title"] = title
    done.toy.write(done.folder)


def test_a_run_of_one_method_shows_its_figures_and_writes_the_report(done: Copy) -> None:
    (done.folder / "metrics" / "cam.json").unlink()  # so that there is something to do
    command = [sys.executable, "-m", "stages.run", "cam"]
    shown = subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert any(re.match(r"evaluate@cam .* mIoU: score maps 0\.\d{3} → refined 0\.\d{3} → ", line) for line in lines), lines
    assert lines[-1] == f"report: {(done.folder / 'report' / 'index.html').resolve().as_uri()}"
    assert done.ran() == []


def test_masks_are_exported_in_another_format_without_a_change_of_params(done: Copy, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.export_masks", "cam", "voc_png", "--out", str(tmp_path / "out")]
    first = subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    assert len(list((tmp_path / "out" / "voc_png").rglob("*.png"))) == 9
    again = subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "exist already: choose another --out" in again.stderr


def test_the_report_can_be_written_at_any_time_and_names_the_runs_that_it_lacks(done: Copy) -> None:
    lock, page = (done.folder / "dvc.lock").read_bytes(), done.folder / "report" / "index.html"
    before = page.read_bytes()
    done.toy.params["methods"]["later"] = done.toy.params["methods"]["cam"]
    done.toy.write(done.folder)
    command = [sys.executable, "-m", "stages.report"]
    written = subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, text=True, check=False)
    assert written.returncode == 0, written.stderr
    assert f"report: {page.resolve().as_uri()}" in written.stdout
    text = page.read_text(encoding="utf-8")
    assert "<strong>later</strong> is not on this page: not evaluated yet" in text and "is out of date" not in text
    assert (done.folder / "dvc.lock").read_bytes() == lock
    del done.toy.params["methods"]["later"]
    done.toy.write(done.folder)
    done.touch("pipeline/metrics.py")
    subprocess.run(command, cwd=done.folder, env=environment(), capture_output=True, check=True)
    assert "<strong>cam</strong> is out of date" in page.read_text(encoding="utf-8")
    done.ran()
    assert page.read_bytes() == before


def test_metrics_and_plots_can_be_shown(done: Copy) -> None:
    assert "miou" in done.dvc("metrics", "show", "--json")
    done.dvc("plots", "show", "-o", "plots_page")
    assert (done.folder / "plots_page" / "index.html").is_file()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipeline/crf.py", ["fit_refiner@cam", "refine@cam", "cross_validate@cam", "segment@cam", "relabel@cam"]),
        ("pipeline/exporters/voc_png.py", ["export@cam"]),
        ("pipeline/methods/cam/method.py", ["train@cam", "extract@cam"]),
        ("pipeline/runtime.py", []),
    ],
)
def test_an_edit_that_changes_no_result_reruns_the_stages_that_use_the_file_and_no_more(
    done: Copy, file: str, expected: list[str]
) -> None:
    before = done.results()
    done.touch(file)
    ran = done.ran()
    assert {path: before.get(path) for path, digest in done.results().items() if before.get(path) != digest} == {}
    assert ran == expected


def test_a_new_member_of_an_open_set_and_a_recipe_that_no_run_names_rerun_nothing(done: Copy) -> None:
    (done.folder / "pipeline/refiners/mine").mkdir()
    (done.folder / "pipeline/refiners/mine/refiner.py").write_text('"""Not used yet."""\n', encoding="utf-8")
    done.toy.recipes["unused"] = copy.deepcopy(done.toy.recipes["cam"])
    done.toy.recipes["unused"]["train"]["seed"] = 5
    done.toy.write(done.folder)
    assert done.ran() == []


def test_moving_the_data_reruns_prepare_only(done: Copy) -> None:
    (done.folder / "raw").rename(done.folder / "raw moved")
    done.toy.params["dataset"]["root"] = "raw moved"
    done.toy.write(done.folder)
    assert done.ran() == ["prepare"]


def test_a_second_method_and_a_second_run_of_the_first_stand_beside_it(done: Copy) -> None:
    more, toy = Toy(Path("raw moved"), ["weaktr"]), done.toy
    toy.params["methods"]["weaktr"] = more.params["methods"]["weaktr"] | WEIGHTS
    toy.params["methods"]["cam-again"] = toy.params["methods"]["cam"] | {"recipe": "recipes/cam-again.yaml"}
    toy.recipes |= more.recipes | {"cam-again": copy.deepcopy(toy.recipes["cam"])}
    toy.recipes["cam-again"]["cross_validate"]["folds"] = 0
    toy.write(done.folder)
    ran = done.ran()
    assert [stage for stage in ran if stage.endswith("@weaktr")] == [f"{stage}@weaktr" for stage in STAGES]
    assert [stage for stage in ran if stage.endswith("@cam-again")] == [f"{stage}@cam-again" for stage in STAGES]
    assert len(ran) == 2 * len(STAGES) + 1 and ran[-1] == "report"
    results = done.results()
    for out in ("model.safetensors", "pseudo_masks", "segmenter.safetensors"):
        assert results[f"artifacts/cam-again/{out}"] == results[f"artifacts/cam/{out}"]  # a run's name changes no byte
    page = (done.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Weights of the attention heads" in page and "Inner maps of weaktr" in page and "Inner maps of cam," in page
    assert "Inner maps of cam-again" in page


def test_a_change_of_refine_in_one_recipe_reruns_refine_and_what_follows_of_its_run_alone(done: Copy) -> None:
    done.toy.recipes["cam-again"]["refine"]["options"]["crf"]["iterations"] = 2
    done.toy.write(done.folder)
    ran = done.ran()
    following = ("export", "cross_validate", "retrain", "segment", "relabel", "evaluate")
    assert ran[:2] == ["refine@cam-again", "export@cam-again"] and ran[-1] == "report"
    assert set(ran[2:-1]) <= {f"{stage}@cam-again" for stage in following}


def test_the_fully_supervised_upper_bound_of_a_run_is_measured_and_shown(done: Copy) -> None:
    command = [sys.executable, "-m", "benchmarks.upper_bound", "cam"]
    measured = subprocess.run(
        command,
        cwd=done.folder,
        env=environment() | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert measured.returncode == 0, measured.stderr
    bound = json.loads((done.folder / "metrics/upper_bound/cam.json").read_text(encoding="utf-8"))
    assert 0 <= bound["miou"] <= 1 and bound["images"] == 9
    assert done.ran() == ["report"]


def test_a_wrong_param_of_a_late_stage_stops_training_before_it_starts(done: Copy) -> None:
    done.toy.recipes["cam"]["train"]["seed"] = 1
    done.toy.recipes["cam"]["segment"]["windw"] = 3
    done.toy.write(done.folder)
    with pytest.raises(AssertionError, match=r"recipes/cam\.yaml: segment\.windw: unknown key"):
        done.ran("train@cam")
