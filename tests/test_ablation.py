"""Ablations: every row of every plan is a whole run, and a plan runs on toys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks import ablation
from pipeline.core import config
from pipeline.jobs import check
from tests.toys import PROJECT, SCRATCH, Toy, toy_folder

PLANS = sorted((PROJECT / "benchmarks" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_row_of_every_plan_is_well(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = ablation.read(path)
    for row in plan.rows:
        ablation.write(ablation.settings_of(plan, row, plan.seeds[0]), tmp_path)
        assert check.problems() == [], row.name


def test_rows_and_seeds_differ_in_what_they_set_and_share_the_plan(tmp_path: Path) -> None:
    plan = ablation.read(PROJECT / "benchmarks" / "ablations" / "ppl_voc6.yaml")
    rows = {row.name: row for row in plan.rows}
    plain, progressive = (ablation.settings_of(plan, rows[name], 3) for name in ("plain CAM", "progressive"))
    assert plain.params == progressive.params and plain.run.backbone == "vit"
    assert (plain.recipe["train"]["model"]["mode"], plain.recipe["train"]["seed"]) == ("plain", 3)
    assert progressive.recipe["train"]["model"]["mode"] == "progressive"
    assert ablation.settings_of(plan, rows["progressive"], 3) == progressive  # no row leaves a trace in the plan


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("train.model.poling", "recipes/scenes/apc.yaml"),
        ("train.seed.deeper", "recipes/scenes/apc.yaml"),
        ("trian.seed", "recipes/scenes/apc.yaml"),
        ("methods.apc.inti", "presets/scenes-all.yaml"),
    ],
)
def test_a_row_that_sets_what_does_not_exist_is_refused(key: str, file: str) -> None:
    plan = ablation.read(PROJECT / "benchmarks" / "ablations" / "apc_scenes.yaml")
    with pytest.raises(config.ParamsError, match=f"row 'wrong' sets {key}, which {file} does not have"):
        ablation.settings_of(plan, ablation.Row("wrong", {key: 1}), 0)


def test_a_plan_runs_on_toys_and_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(toy_folder(tmp_path / "raw", train=5, val=2))
    toy.params["methods"]["cam"]["recipe"] = str(tmp_path / "recipes" / "cam.yaml")
    toy.write(tmp_path)
    plan = {
        "preset": str(tmp_path / "params.yaml"), "run": "cam", "seeds": [0], "images": 4, "classes": ["disc"],
        "common": {"methods.cam.init": str(SCRATCH), "methods.cam.refiner": "none", "refine.options": {}},
        "rows": [{"name": "as it is", "set": {}}, {"name": "one scale more", "set": {"extract.scales": [1.0, 0.5]}}],
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    words = [str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(ablation.main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"as it is", "one scale more"}
    assert len(list((tmp_path / "out" / "models").glob("*.safetensors"))) == 1  # the rows share their training
    monkeypatch.setattr(ablation, "stage", lambda *rest: 1 / 0)
    assert CliRunner().invoke(ablation.main, words).exit_code == 0
