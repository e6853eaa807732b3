"""One real `dvc repro` on toys, in a copy of the project: what runs, what runs again, and what comes out."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.core import store
from pipeline.readers import PseudoMasks
from tests.toys import PROJECT, toy_folder, toy_params

COLUMN = ("train", "extract", "fit_refiner", "refine", "export", "cross_validate", "retrain", "segment", "evaluate")
COPIED = ("pipeline", "stages", "dvc.yaml", "pyproject.toml", ".dvcignore", ".gitignore")


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": ".", "TAG2MASK_DEVICE": "cpu", **more}


class Copy:
    """A copy of the project with toy data and toy params, under git and DVC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            source = PROJECT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, folder / name)
        (folder / "data" / "weights").mkdir(parents=True)
        (folder / "data" / "corrections").mkdir()
        shutil.copy(PROJECT / "data" / "weights" / "scratch.txt", folder / "data" / "weights")
        toy_folder(folder / "raw", train=9, val=3)
        self.params = toy_params(Path("raw"))
        for slot in ("init", "segmenter_init"):
            self.params["methods"]["cam"][slot] = "data/weights/scratch.txt"
        self.params["cross_validate"]["cam"]["folds"] = 2
        self.write_params()
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        self.dvc("init", "-q")
        self.dvc("config", "core.analytics", "false")

    def write_params(self) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False), encoding="utf-8")

    def dvc(self, *words: str, **env: str) -> str:
        command = [sys.executable, "-m", "dvc", *words]
        done = subprocess.run(command, cwd=self.folder, env=environment(**env), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"dvc {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    def ran(self, *words: str, **env: str) -> list[str]:
        """Stages that a `dvc repro` ran, in order."""
        out = self.dvc("repro", *words, **env)
        return [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage '")]

    def touch(self, file: str) -> None:
        path = self.folder / file
        path.write_text(path.read_text(encoding="utf-8") + "\n# touched\n", encoding="utf-8")

    def results(self) -> dict[str, str]:
        """Path of every out → its hash, as DVC has locked them."""
        stages = yaml.safe_load((self.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("project") / "copy")
    assert copy.ran() == ["prepare", *(f"{stage}@cam" for stage in COLUMN), "report"]
    return copy


def test_a_full_run_leaves_masks_metrics_and_a_report(done: Copy) -> None:
    masks = PseudoMasks(done.folder / "artifacts/cam/pseudo_masks")
    assert len(masks) == 9 and masks.labels.names == ("disc", "square")
    metrics = json.loads((done.folder / "metrics/cam.json").read_text(encoding="utf-8"))
    assert metrics["truth"] and set(metrics["stages"]) == {
        "score_maps", "refined", "pseudo_masks", "score_maps_val", "predictions",
    }  # fmt: skip
    page = (done.folder / "report/index.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64" in page and "http://" not in page and "https://" not in page
    assert not list((done.folder / ".work").glob("*"))


def test_extract_tells_how_well_the_views_agree_and_the_audit_has_it_for_every_image(done: Copy) -> None:
    maps = store.Store(done.folder / "artifacts/cam/scoremaps", store.SCORE_MAPS).column("agreement")
    assert len(maps) == 12 and all(((values >= 0) & (values <= 1)).all() for values in maps.values())
    with (done.folder / "audit/cam.csv").open(encoding="utf-8", newline="") as file:
        indicators = {row["id"]: row["views"] for row in csv.DictReader(file) if row["stage"] == "pseudo_masks"}
    assert len(indicators) == 9 and all(
        float(value) == pytest.approx(maps[image_id].astype(np.float64).mean(), abs=1e-5)
        for image_id, value in indicators.items()
    )


def test_a_second_run_runs_nothing(done: Copy) -> None:
    assert done.ran() == []


def test_metrics_and_plots_can_be_shown(done: Copy) -> None:
    assert "miou" in done.dvc("metrics", "show", "--json")
    done.dvc("plots", "show", "-o", "plots_page")
    assert (done.folder / "plots_page" / "index.html").is_file()


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("pipeline/crf.py", ["fit_refiner@cam", "refine@cam", "cross_validate@cam", "segment@cam"]),
        ("pipeline/metrics.py", ["cross_validate@cam", "evaluate@cam"]),
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


def test_a_new_file_in_an_open_set_reruns_nothing(done: Copy) -> None:
    (done.folder / "pipeline/refiners/mine.py").write_text('"""Not used yet."""\n', encoding="utf-8")
    assert done.ran() == []


def test_a_change_of_refine_params_reruns_refine_and_what_follows_from_it(done: Copy) -> None:
    done.params["refine"]["cam"]["options"]["crf"]["iterations"] = 2
    done.write_params()
    ran = done.ran()
    assert ran[:2] == ["refine@cam", "export@cam"] and not {"train@cam", "extract@cam", "fit_refiner@cam"} & set(ran)


def test_moving_the_data_reruns_prepare_only(done: Copy) -> None:
    (done.folder / "raw").rename(done.folder / "raw moved")
    done.params["dataset"]["root"] = "raw moved"
    done.write_params()
    assert done.ran() == ["prepare"]


def test_a_second_method_is_one_more_column_beside_the_first(done: Copy) -> None:
    more = toy_params(Path("raw moved"), ["weaktr"])
    more["methods"]["weaktr"] |= dict.fromkeys(("init", "segmenter_init"), "data/weights/scratch.txt")
    for section, values in more.items():
        if isinstance(values, dict) and "weaktr" in values:
            done.params[section]["weaktr"] = values["weaktr"]
    done.write_params()
    assert done.ran() == [*(f"{stage}@weaktr" for stage in COLUMN), "report"]
    page = (done.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "Weights of the attention maps" in page and "Inside weaktr" in page and "Inside cam" in page


def test_a_wrong_param_of_a_late_stage_stops_training_before_it_starts(done: Copy) -> None:
    done.params["train"]["cam"]["seed"] = 1
    done.params["segment"]["cam"]["windw"] = 3
    done.write_params()
    with pytest.raises(AssertionError, match=r"segment\.cam\.windw: unknown key"):
        done.ran("train@cam")


def test_the_same_run_with_other_workers_and_ranks_gives_the_same_bytes(done: Copy, tmp_path: Path) -> None:
    other = Copy(tmp_path / "other")
    other.ran("evaluate@cam", TAG2MASK_WORKERS="3", TAG2MASK_RANKS="1")
    again = Copy(tmp_path / "again")
    again.ran("evaluate@cam", TAG2MASK_WORKERS="1", TAG2MASK_RANKS="2")
    assert other.results() == again.results()
