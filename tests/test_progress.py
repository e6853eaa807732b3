"""What a person sees while a stage works: one bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import runtime
from tests.toys import PROJECT

STAGE = """
import time
from pipeline import runtime
def seen(item):
    return item
if __name__ == "__main__":
    with runtime.stage():
        list(runtime.map_parts(seen, [["a", "b"], ["c"], ["d", "e"]], what="look at images", images=len))
        notes = (f"classify loss {0.5 - step / 10:.4f}" for step in range(3))
        for note in runtime.progress(notes, 10, "train cam", done=7, noun="steps"):
            time.sleep(0.3)
        runtime.warn("pseudo-masks of %s: 1 of 2 [tagged] classes", "cam")
"""


def on_a_terminal(folder: Path) -> str:
    """What a pseudo-terminal shows of a short stage."""
    (folder / "script.py").write_text(STAGE, encoding="utf-8")
    parent, child = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=folder, stdin=child, stdout=child, stderr=child,
        env={**clean, "PYTHONPATH": str(PROJECT), "TERM": "xterm-256color", "COLUMNS": "160", "TAG2MASK_WORKERS": "1"},
    )  # fmt: skip
    os.close(child)
    shown = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # Linux's end of a pseudo-terminal
            break
        if not piece:
            break
        shown += piece
    os.close(parent)
    assert process.wait() == 0, shown
    return shown.decode("utf-8")


def test_a_terminal_shows_a_bar_with_rate_time_left_and_losses_and_keeps_a_line_of_it(tmp_path: Path) -> None:
    shown = on_a_terminal(tmp_path)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    bars = [line for line in re.split(r"[\r\n]+", plain) if "train cam" in line and "━" in line]
    assert bars and re.search(r"\d+/10 +[\d.]+ steps/s +\S*\d:\d\d", bars[-1]) and "classify loss 0.3" in bars[-1], bars
    assert re.search(r"train cam 10/10 steps \d+ s \([\d.]+ steps/s\)", plain)
    assert re.search(r"look at images 5/5 images \d+ s", plain)
    assert not [line for line in bars if "look at images" in line]  # one bar at a time


def test_a_warning_is_red_on_a_terminal(tmp_path: Path) -> None:
    assert "\x1b[1;31mpseudo-masks of cam: 1 of 2 [tagged] classes" in on_a_terminal(tmp_path)


def test_a_log_has_a_line_per_tenth(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tag2mask"):
        assert list(runtime.progress(range(40), 40, "extract")) == list(range(40))
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines] == [f"{count}/40" for count in range(4, 41, 4)]


def test_a_run_that_goes_on_counts_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tag2mask"):
        list(runtime.progress(["loss 1"] * 4, 10, "train cam", done=6, noun="steps"))
    assert [record.getMessage().split()[2] for record in caplog.records] == ["7/10", "8/10", "9/10", "10/10"]
    assert caplog.records[0].getMessage().endswith("loss 1")


def test_images_are_counted_one_by_one_where_the_last_part_is_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    with caplog.at_level(logging.INFO, logger="tag2mask"):
        list(runtime.map_parts(len, [["a"] * 32, ["b"] * 32, ["c"] * 8], what="prepare", images=len))
    assert [record.getMessage().split()[1] for record in caplog.records] == ["32/72", "64/72", "72/72"]


def test_a_warning_is_a_plain_line_in_a_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tag2mask"):
        runtime.warn("%d of %d", 5, 6)
    assert [record.getMessage() for record in caplog.records] == ["warning: 5 of 6"]
