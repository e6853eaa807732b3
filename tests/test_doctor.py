"""`make doctor` reports nothing on a sound project, and advice on what is missing or wrong."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pipeline import runtime
from pipeline.engine import available
from pipeline.jobs import doctor
from stages.doctor import main
from tests.toys import Toy, toy_folder


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `make doctor` in a folder with these params and recipes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 0)

    def run(toy: Toy, *words: str) -> Result:
        toy.write(tmp_path)
        return CliRunner().invoke(main, words)

    return run


def test_a_sound_project_needs_nothing(diagnose: Callable[..., Result], tmp_path: Path) -> None:
    result = diagnose(Toy(toy_folder(tmp_path / "raw")))
    assert result.exit_code == 0, result.output
    assert "FIX" not in result.output and result.output.count("ok  ") == len(doctor.CHECKS) + len(runtime.described())


def test_engines_processes_and_their_variables_are_named(
    diagnose: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(toy_folder(tmp_path / "raw"))
    for name, value in (("TAG2MASK_WORKERS", "3"), ("TAG2MASK_LOADERS", "5"), ("RAY_ADDRESS", "10.0.0.1:6379")):
        monkeypatch.setenv(name, value)
    output = diagnose(toy).output
    assert f"engine: local; Ray {metadata.version('ray')} is there" in output and "RAY_ADDRESS=10.0.0.1:6379" in output
    assert "3 for parts on CPU (TAG2MASK_WORKERS), each with 5 threads that decode (TAG2MASK_LOADERS)" in output
    monkeypatch.setenv("TAG2MASK_LOADERS", "many")
    result = diagnose(toy)
    assert result.exit_code == 1 and "FIX  environment: TAG2MASK_LOADERS='many' is not allowed" in result.output


def test_ray_that_is_asked_for_and_not_installed_has_a_cure(
    diagnose: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    toy = Toy(toy_folder(tmp_path / "raw"))
    monkeypatch.setattr(available.metadata, "version", version)
    monkeypatch.setattr(doctor, "CHECKS", ())
    assert "ok   engine: local; Ray, for a cluster, is not installed" in diagnose(toy).output
    monkeypatch.setenv("TAG2MASK_ENGINE", "ray")
    result = diagnose(toy)
    assert result.exit_code == 1 and "→ pip install 'tag2mask[ray]', or TAG2MASK_ENGINE=local" in result.output


def test_quiet_says_nothing_where_packages_are_well_whatever_the_params(diagnose: Callable[..., Result]) -> None:
    toy = Toy(Path("raw"))
    toy.params = {"nonsense": 1}
    result = diagnose(toy, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def test_missing_weights_and_data_are_named_with_what_to_do(diagnose: Callable[..., Result], tmp_path: Path) -> None:
    toy = Toy(toy_folder(tmp_path / "raw"))
    toy.params["methods"]["cam"]["init"] = "data/weights/gone.safetensors"
    result = diagnose(toy)
    assert result.exit_code == 1 and "missing: data/weights/gone.safetensors" in result.output
    result = diagnose(Toy(tmp_path / "nowhere"))
    assert result.exit_code == 1 and "nowhere is no folder" in result.output and "make data" in result.output


def test_every_problem_of_params_is_listed(diagnose: Callable[..., Result], tmp_path: Path) -> None:
    toy = Toy(toy_folder(tmp_path / "raw"))
    toy.recipes["cam"]["extract"]["stride"], toy.params["evaluate"]["thumbnail"] = 0, 1
    result = diagnose(toy)
    assert result.exit_code == 1
    assert "recipes/cam.yaml: extract.stride" in result.output and "params.yaml: evaluate.thumbnail" in result.output


def test_a_broken_package_and_a_missing_tool_have_a_cure(
    diagnose: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (doctor.package("no_such_module", "timm"), doctor.tool("no-such-tool", "apt-get install it"))
    monkeypatch.setattr(doctor, "PACKAGES", broken)
    result = diagnose(Toy(Path("raw")), "--quiet")
    assert result.exit_code == 1
    assert "FIX  timm: cannot be imported" in result.output and "make setup" in result.output
    assert "FIX  no-such-tool: missing" in result.output and "apt-get install it" in result.output
