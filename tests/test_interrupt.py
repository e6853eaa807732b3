"""A signal ends work in order: a checkpoint, one line that says how far it is, exit code 130, no traceback from anywhere."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core import processes
from tests.toys import PROJECT, SCRATCH, Toy, toy_folder

PREPARE = ["--raw", "raw", "--records", "records.h5", "--truth", "truth.h5"]
TRAIN = ["cam", "--records", "records.h5", "--init", str(SCRATCH), "--model", "model.safetensors", "--log", "log.csv"]
STAGE = "from stages.{0} import main\nif __name__ == '__main__':\n    main()\n"
EACH = """
import sys, time
from pathlib import Path
from pipeline import runtime
def slow(item):
    Path(f"item-{item}").touch()
    time.sleep(0.3)
    return item
if __name__ == "__main__":
    with runtime.stage():
        for item in runtime.map_parts(slow, list(range(200)), what="items"):
            sys.stderr.write("an item\\n"); sys.stderr.flush()
"""


def start(folder: Path, script: str, words: list[str], **variables: str) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal gives to a command."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    return subprocess.Popen(
        [sys.executable, "script.py", *words], cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**clean, "PYTHONPATH": str(PROJECT), "TAG2MASK_DEVICE": "cpu", **variables},
    )  # fmt: skip


def ended(process: subprocess.Popen[str], begin: str, number: signal.Signals) -> str:
    """Sends the signal to the whole group, as Ctrl-C does, once a line begins so; what is printed after that line."""
    assert process.stderr is not None
    for printed in process.stderr:
        if printed.startswith(begin):
            break
    os.killpg(process.pid, number)
    return process.communicate()[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_folder(tmp_path / "raw", train=8, val=2)
    toy = Toy(Path("raw"))
    toy.recipes["cam"]["train"]["schedule"] |= {"epochs": 1, "min_steps": 30}
    toy.write(tmp_path)
    assert start(tmp_path, STAGE.format("prepare"), PREPARE, TAG2MASK_WORKERS="1").communicate()[1]
    return tmp_path


@pytest.mark.parametrize(
    ("number", "ranks", "launcher"),
    [(signal.SIGINT, "2", "spawn"), (signal.SIGTERM, "1", "inline")],
    ids=["Ctrl-C, two ranks", "kill, one process"],
)
def test_a_training_saves_and_goes_on_where_it_was(folder: Path, number: signal.Signals, ranks: str, launcher: str) -> None:
    variables = {"TAG2MASK_RANKS": ranks, "TAG2MASK_LAUNCHER": launcher}
    process = start(folder, STAGE.format("train"), TRAIN, **variables)
    text = ended(process, "train cam 3/30 ", number)
    assert process.returncode == 130 and "Traceback" not in text, text
    assert not (folder / "model.safetensors").exists()
    (line,) = [line for line in text.splitlines() if line.startswith("interrupted at step ")]
    step = int(line.split()[3])
    assert line == f"interrupted at step {step} of 30; saved; run again to go on" and 3 <= step < 30

    again = start(folder, STAGE.format("train"), TRAIN, **variables)
    text = again.communicate()[1]
    assert again.returncode == 0, text
    assert f"train cam: resuming at step {step} of 30" in text.splitlines()
    counts = [int(line.split()[2].split("/")[0]) for line in text.splitlines() if re.match(r"train cam \d+/30 ", line)]
    assert counts and min(counts) > step and counts[-1] == 30
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_a_process_is_started_is_not_lost(number: signal.Signals) -> None:
    started = []
    with pytest.raises(KeyboardInterrupt), processes.interrupted_by_signal():
        with processes.deaf_children():
            os.kill(os.getpid(), number)
            started.append("a process")
        pytest.fail("the signal was lost")
    assert started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_work_in_parts_ends_with_the_parts_in_flight(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, EACH, [], TAG2MASK_WORKERS="2")
    text = ended(process, "an item", number)
    assert process.returncode == 130 and "Traceback" not in text, text
    assert "interrupted; what is finished is kept; run again to go on" in text
    assert len(list(tmp_path.glob("item-*"))) < 200
