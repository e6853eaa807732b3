"""Ablations: every row of every plan is a whole params file, and a plan runs on toys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from benchmarks import ablation
from pipeline.core import config
from stages import check
from tests.toys import PROJECT, SCRATCH, toy_folder, toy_params

PLANS = sorted((PROJECT / "benchmarks" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_every_row_of_every_plan_is_well(path: Path, tmp_path: Path) -> None:
    plan = ablation.read(path)
    for row in plan.rows:
        values = ablation.params_of(plan, row, plan.seeds[0])
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        assert check.problems(tmp_path / "params.yaml") == [], row.name


def test_a_row_that_sets_what_does_not_exist_is_refused() -> None:
    plan = ablation.read(PLANS[0])
    with pytest.raises(config.ParamsError, match=r"'wrong' sets train\.apc\.model\.poling"):
        ablation.params_of(plan, ablation.Row("wrong", {"train.apc.model.poling": 1}), 0)


def test_a_plan_runs_on_toys_and_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = toy_params(toy_folder(tmp_path / "raw", train=5, val=2), ["cam"])
    (tmp_path / "toys.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    plan = {
        "preset": str(tmp_path / "toys.yaml"), "column": "cam", "seeds": [0], "images": 4, "classes": ["disc"],
        "common": {"methods.cam.init": str(SCRATCH), "methods.cam.refiner": "none", "refine.cam.options": {}},
        "rows": [{"name": "as it is", "set": {}}, {"name": "one scale more", "set": {"extract.cam.scales": [1.0, 0.5]}}],
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    words = [str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(ablation.main, words)
    assert found.exit_code == 0, (found.output, found.exception)
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"as it is", "one scale more"}
    assert len(list((tmp_path / "out" / "models").glob("*.safetensors"))) == 1  # the rows share their training
    monkeypatch.setattr(ablation, "stage", lambda *rest: 1 / 0)
    assert CliRunner().invoke(ablation.main, words).exit_code == 0
