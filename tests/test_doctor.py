"""`make doctor`: what it says of a sound project, and of what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from stages import doctor
from tests import toys


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], Result]:
    """What it says in a folder with these params."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "FREE_GIB", 0)

    def run(values: dict[str, Any], *words: str) -> Result:
        Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return CliRunner().invoke(doctor.main, words)

    return run


def test_a_sound_project_needs_nothing(told: Callable[..., Result], tmp_path: Path) -> None:
    found = told(toys.toy_params(toys.toy_folder(tmp_path / "raw")))
    assert found.exit_code == 0, found.output
    assert "FIX" not in found.output and found.output.count("ok  ") == len(doctor.CHECKS)


def test_quiet_says_nothing_where_packages_are_well_whatever_the_params(told: Callable[..., Result]) -> None:
    found = told({"nonsense": 1}, "--quiet")
    assert (found.exit_code, found.output) == (0, "")


def test_missing_weights_and_data_are_named_with_what_to_do(told: Callable[..., Result], tmp_path: Path) -> None:
    values = toys.toy_params(toys.toy_folder(tmp_path / "raw"))
    values["methods"]["cam"]["init"] = "data/weights/gone.safetensors"
    found = told(values)
    assert found.exit_code == 1 and "missing: data/weights/gone.safetensors" in found.output
    values = toys.toy_params(tmp_path / "nowhere")
    found = told(values)
    assert found.exit_code == 1 and "nowhere is no folder" in found.output and "make data" in found.output


def test_every_mistake_in_params_is_told(told: Callable[..., Result], tmp_path: Path) -> None:
    values = toys.toy_params(toys.toy_folder(tmp_path / "raw"))
    values["extract"]["cam"]["stride"], values["evaluate"]["thumbnail"] = 0, 1
    found = told(values)
    assert found.exit_code == 1 and "extract.cam.stride" in found.output and "evaluate.thumbnail" in found.output


def test_a_broken_package_and_a_missing_tool_have_a_cure(
    told: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (doctor.package("no_such_module", "timm"), doctor.tool("no-such-tool", "apt-get install it"))
    monkeypatch.setattr(doctor, "CHECKS", broken)
    found = told({}, "--quiet")
    assert found.exit_code == 1
    assert "FIX  timm: cannot be imported" in found.output and "make setup" in found.output
    assert "FIX  no-such-tool: missing" in found.output and "apt-get install it" in found.output
