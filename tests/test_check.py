"""check looks at settings, files and steps before a long run; errors end it, warnings do not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from pipeline.jobs import check
from stages.check import main
from tests.toys import SCRATCH, Toy, toy_folder

SHORT = "5 epochs × 9 images / batch 4 = 11 steps: nothing will be learned; take at least 150"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A project whose data, weights and steps are as they should be, to be spoilt and written."""
    toy_folder(tmp_path / "raw", train=9, val=3)
    made = Toy(Path("raw"), ("cam", "weaktr"))
    for recipe in made.recipes.values():
        for section in ("train", "retrain"):
            recipe[section]["schedule"]["min_steps"] = 150
    monkeypatch.chdir(tmp_path)
    return made


def checked(toy: Toy, *words: str) -> Result:
    toy.write(Path())
    return CliRunner().invoke(main, words)


def test_a_project_that_lacks_nothing_is_valid_without_a_warning(toy: Toy) -> None:
    result = checked(toy)
    assert result.exit_code == 0 and result.stderr == "", result.output


def test_a_root_that_is_missing_is_an_error(toy: Toy) -> None:
    toy.params["dataset"]["root"] = "nowhere"
    result = checked(toy)
    assert result.exit_code == 1 and "dataset.root nowhere is no folder; edit params.yaml" in result.stderr


def test_weights_that_are_missing_are_an_error_that_names_where_to_get_them(toy: Toy) -> None:
    for run in toy.params["methods"].values():
        run["init"] = "data/weights/deit_tiny_patch16_224.safetensors"
    toy.params["methods"]["cam"]["segmenter_init"] = "elsewhere.pth"
    result = checked(toy)
    assert result.exit_code == 1
    assert (
        "methods.cam.init, methods.weaktr.init: there is no file data/weights/deit_tiny_patch16_224.safetensors; get it "
        "with `tag2mask weights get deit_tiny_patch16_224` (data/weights/README.md)" in result.stderr
    )
    assert "methods.cam.segmenter_init: there is no file elsewhere.pth" in result.stderr


def test_files_of_other_runs_are_not_asked_for_where_one_run_is_named(toy: Toy) -> None:
    toy.params["methods"]["weaktr"]["init"] = "nowhere.pth"
    assert checked(toy, "--run", "cam").exit_code == 0
    assert checked(toy, "--run", "weaktr").exit_code == 1


def test_weights_that_another_run_makes_need_not_be_there_yet(toy: Toy) -> None:
    toy.params["methods"]["cam"]["init"] = "artifacts/weaktr/model.safetensors"
    assert checked(toy).exit_code == 0
    toy.params["methods"]["cam"]["init"] = "artifacts/afa/model.safetensors"
    result = checked(toy)
    assert result.exit_code == 1 and "which run 'afa' would make; add it to methods of params.yaml" in result.stderr


def test_a_recipe_that_is_missing_is_an_error(toy: Toy) -> None:
    toy.params["methods"]["cam"]["recipe"] = "recipes/none.yaml"
    result = checked(toy)
    assert result.exit_code == 1 and "recipe recipes/none.yaml is missing" in result.stderr


def test_a_training_that_is_too_short_is_a_warning_with_exit_code_0(toy: Toy) -> None:
    toy.recipes["cam"]["train"]["schedule"] |= {"epochs": 5, "min_steps": 0}
    result = checked(toy)
    assert result.exit_code == 0
    assert f"Warning: recipes/cam.yaml: train: {SHORT}" in result.stderr and result.stderr.count("Warning") == 1


def test_warnings_and_errors_are_listed_apart(toy: Toy) -> None:
    toy.recipes["cam"]["train"]["schedule"] |= {"epochs": 5, "min_steps": 0}
    toy.params["methods"]["cam"]["init"] = "nowhere.pth"
    result = checked(toy)
    warning, error = result.stderr.split("Error: ")
    assert result.exit_code == 1 and SHORT in warning and "nowhere.pth" in error and SHORT not in error


def test_weights_in_the_house_need_no_advice(toy: Toy) -> None:
    toy.write(Path())
    assert SCRATCH.is_file() and check.missing_files() == []


@pytest.mark.parametrize(
    ("capabilities", "fast"), [({"avx512_bf16": True}, True), ({"avx512_bf16": False, "avx2": True}, False)]
)
def test_a_precision_that_the_processor_only_emulates_is_a_warning(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for section in ("train", "extract"):
        toy.recipes["cam"][section]["precision"] = "bf16"
    result = checked(toy)
    assert result.exit_code == 0
    warned = [line.split(": ")[2] for line in result.stderr.splitlines() if "only emulates" in line]
    named = ["train", "extract"]
    assert warned == ([] if fast else [f"{name}.precision is bf16, which this processor only emulates" for name in named])
