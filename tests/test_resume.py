"""kill -9 in the middle of train and of extract: the next run goes on, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.toys import PROJECT, SCRATCH, Toy, toy_folder

PREPARE = ["--raw", "raw", "--records", "records.h5", "--truth", "truth.h5"]
TRAIN = ["cam", "--records", "records.h5", "--init", str(SCRATCH), "--model", "model.safetensors", "--log", "log.csv"]
EXTRACT = [
    "cam",
    "--records",
    "records.h5",
    "--model",
    "model.safetensors",
    "--scoremaps",
    "scoremaps",
    "--inspection",
    "inspection.h5",
]
# the stage as a user starts it, but with a checkpoint after every step
CODE = "import pipeline.training.resume as resume; resume.CHECKPOINT_SECONDS = 0.0; from stages.{0} import main; main()"


def start(folder: Path, stage: str, words: list[str]) -> subprocess.Popen[bytes]:
    clean = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE.format(stage), *words],
        cwd=folder,
        env={
            **clean,
            "PYTHONPATH": str(PROJECT),
            "TAG2MASK_LAUNCHER": "inline",
            "TAG2MASK_RANKS": "1",
            "TAG2MASK_DEVICE": "cpu",
        },
        stderr=subprocess.DEVNULL,
    )


def run(folder: Path, stage: str, words: list[str]) -> None:
    assert start(folder, stage, words).wait() == 0


def killed_when(folder: Path, stage: str, words: list[str], pattern: str) -> None:
    """Starts a stage and kills it, as the kernel would, once a file of that pattern lies in its work space."""
    process = start(folder, stage, words)
    deadline = time.monotonic() + 120
    while process.poll() is None and not list((folder / ".work").glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, "the stage ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_folder(tmp_path / "raw", train=18, val=3)
    toy = Toy(Path("raw"))
    toy.recipes["cam"]["train"]["schedule"]["epochs"] = 4
    toy.recipes["cam"]["extract"]["images_per_part"] = 2
    toy.write(tmp_path)
    run(tmp_path, "prepare", PREPARE)
    return tmp_path


def test_training_and_extraction_that_were_killed_end_with_the_same_bytes(folder: Path) -> None:
    run(folder, "train", TRAIN)
    run(folder, "extract", EXTRACT)
    model, log = (folder / "model.safetensors").read_bytes(), (folder / "log.csv").read_bytes()
    parts = {path.name: path.read_bytes() for path in (folder / "scoremaps").iterdir()}
    (folder / "model.safetensors").unlink()

    killed_when(folder, "train", TRAIN, "*/checkpoint.safetensors")
    assert not (folder / "model.safetensors").exists()
    run(folder, "train", TRAIN)
    assert (folder / "model.safetensors").read_bytes() == model and (folder / "log.csv").read_bytes() == log

    killed_when(folder, "extract", EXTRACT, "*/result/part-00001.h5")
    run(folder, "extract", EXTRACT)
    assert {path.name: path.read_bytes() for path in (folder / "scoremaps").iterdir()} == parts and len(parts) == 11
    assert not list((folder / ".work").iterdir())
