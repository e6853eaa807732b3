"""What a run on more images, or more devices, will cost: from rates that were measured on a sample, or that a user gives."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline import runtime
from pipeline.core.config import ParamsError
from pipeline.jobs import plan, rates
from pipeline.jobs.plan import Images, Machine
from pipeline.jobs.rates import PhaseRate, Rate, Rates
from tests.toys import PROJECT, Toy, toy_folder

TRAIN = Rate(
    start=10.0, image={}, phases={"main": PhaseRate(2.0, 0, 10, 4, 2, step=0.5, score=0.0)}, bytes=1e6,
    bytes_per_image=0.0, memory_mib=500.0, worker_mib=300.0, gpu=True,
)  # fmt: skip
REFINE = Rate(
    start=2.0, image={"refine": 0.1}, phases={}, bytes=0.0, bytes_per_image=100.0, memory_mib=100.0, worker_mib=50.0,
    gpu=False,
)  # fmt: skip
RATES = Rates("host", "cpu", 48, 0.8, {"cam": {"train": TRAIN, "refine": REFINE}})


def costs(images: Images, machine: Machine, known: Rates = RATES) -> dict[str, plan.Row]:
    rows = plan.of_run(Toy(Path("raw")).settings(), known, images, machine)
    return {row.stage: row for row in rows}


def test_steps_are_counted_as_the_training_loop_counts_them() -> None:
    assert costs(Images(100, 25), Machine(2, 0))["train"].seconds == pytest.approx(10 + 20 * 0.5)
    assert costs(Images(1000, 250), Machine(2, 0))["train"].seconds == pytest.approx(10 + 200 * 0.5)


def test_ranks_share_shards_and_no_more_than_there_are() -> None:
    seconds = [costs(Images(1000, 250), Machine(cores, 0))["train"].seconds for cores in (1, 2, 3, 4, 8)]
    assert seconds == pytest.approx([210, 110, 110, 60, 60])


def test_the_worker_with_the_longest_way_decides() -> None:
    """The toys' parts are of 4 images: of 5 parts on two workers one has three."""
    part = Toy(Path("raw")).settings().recipe["refine"]["images_per_part"]
    row = costs(Images(5 * part, 0), Machine(2, 0))["refine"]
    assert row.seconds == pytest.approx(2 + 3 * part * 0.1)
    assert row.bytes == 5 * part * 100


def test_many_images_take_as_long_as_their_number_says() -> None:
    assert costs(Images(10_000_000, 0), Machine(4, 0))["refine"].seconds == pytest.approx(2 + 1e6 / 4, rel=1e-3)


def test_a_cpu_says_nothing_of_gpus_unless_the_user_does() -> None:
    assert plan.unknown_on_gpus(RATES, {}, ["cam"]) == ["train"]
    assert plan.unknown_on_gpus(RATES, {"train": 100.0}, ["cam"]) == []
    assert plan.unknown_on_gpus(replace(RATES, device="cuda"), {}, ["cam"]) == []


def test_given_speeds_are_of_one_gpu() -> None:
    known = plan.with_speed(RATES, {"train": 100.0})
    assert costs(Images(1000, 0), Machine(2, 1), known)["train"].seconds == pytest.approx(10 + 200 * 10 / 100)
    assert costs(Images(1000, 0), Machine(2, 4), known)["train"].seconds == pytest.approx(10 + 200 * 10 / 100 / 4)
    with pytest.raises(ValueError, match="--speed: report: allowed are train"):
        plan.with_speed(RATES, {"report": 1.0})


def test_gpus_that_have_no_shard_are_named() -> None:
    assert plan.few_shards(RATES, "cam", 4) == []
    assert plan.few_shards(RATES, "cam", 8) == ["train: 4 shards keep 4 of 8 GPUs busy; a larger schedule.shards uses more"]


def test_rates_are_read_as_they_were_written_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    rates.write(path, RATES)
    assert rates.read(path) == RATES
    path.write_text(path.read_text("utf-8").replace("start: 10.0", "start: -1"), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"start"):
        rates.read(path)


def test_a_sample_of_the_project_is_measured_and_nothing_of_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages behind extract are left out, for a fast test."""
    monkeypatch.chdir(tmp_path)
    toy = Toy(toy_folder(tmp_path / "raw"))
    toy.write(tmp_path)
    (tmp_path / "dvc.yaml").write_bytes((PROJECT / "dvc.yaml").read_bytes())
    command = [sys.executable, "-m", "stages.prepare", "--raw", "raw", "--records", "data/records.h5"]
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    subprocess.run([*command, "--truth", "data/truth.h5"], check=True)
    monkeypatch.setattr(rates, "STAGES", ("prepare", "train", "extract"))
    measured = rates.measure("cam", records=Path("data/records.h5"), truth=Path("data/truth.h5"), stages=runtime)
    assert list(measured) == ["prepare", "train", "extract"]
    (phase,) = measured["train"].phases.values()
    assert phase.step > 0 and phase.epochs == toy.recipes["cam"]["train"]["schedule"]["epochs"]
    assert measured["extract"].image["extract"] > 0 and measured["extract"].bytes_per_image > 0
    assert not (tmp_path / "artifacts").exists() and not list(tmp_path.glob(".work/*"))
    assert yaml.safe_load((tmp_path / "params.yaml").read_text("utf-8")) == toy.params
