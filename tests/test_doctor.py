"""`make doctor`: what it says of a sound project, and of what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline.jobs import doctor
from stages.doctor import main
from tests.toys import Toy, toy_folder


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """What it says in a folder with these params and recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 0)

    def run(toy: Toy, *words: str) -> Result:
        toy.write(tmp_path)
        return CliRunner().invoke(main, words)

    return run


def test_a_sound_project_needs_nothing(told: Callable[..., Result], tmp_path: Path) -> None:
    found = told(Toy(toy_folder(tmp_path / "raw")))
    assert found.exit_code == 0, found.output
    assert "FIX" not in found.output and found.output.count("ok  ") == len(doctor.CHECKS)


def test_quiet_says_nothing_where_packages_are_well_whatever_the_params(told: Callable[..., Result]) -> None:
    toy = Toy(Path("raw"))
    toy.params = {"nonsense": 1}
    found = told(toy, "--quiet")
    assert (found.exit_code, found.output) == (0, "")


def test_missing_weights_and_data_are_named_with_what_to_do(told: Callable[..., Result], tmp_path: Path) -> None:
    toy = Toy(toy_folder(tmp_path / "raw"))
    toy.params["methods"]["cam"]["init"] = "data/weights/gone.safetensors"
    found = told(toy)
    assert found.exit_code == 1 and "missing: data/weights/gone.safetensors" in found.output
    found = told(Toy(tmp_path / "nowhere"))
    assert found.exit_code == 1 and "nowhere is no folder" in found.output and "make data" in found.output


def test_every_mistake_in_params_is_told(told: Callable[..., Result], tmp_path: Path) -> None:
    toy = Toy(toy_folder(tmp_path / "raw"))
    toy.recipes["cam"]["extract"]["stride"], toy.params["evaluate"]["thumbnail"] = 0, 1
    found = told(toy)
    assert found.exit_code == 1
    assert "recipes/cam.yaml: extract.stride" in found.output and "params.yaml: evaluate.thumbnail" in found.output


def test_a_broken_package_and_a_missing_tool_have_a_cure(
    told: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (doctor.package("no_such_module", "timm"), doctor.tool("no-such-tool", "apt-get install it"))
    monkeypatch.setattr(doctor, "PACKAGES", broken)
    found = told(Toy(Path("raw")), "--quiet")
    assert found.exit_code == 1
    assert "FIX  timm: cannot be imported" in found.output and "make setup" in found.output
    assert "FIX  no-such-tool: missing" in found.output and "apt-get install it" in found.output
