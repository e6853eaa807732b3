"""Where a job's work runs: in order, in as many processes as the environment says, with one torch thread in each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline import runtime
from tests.toys import PROJECT

ITEMS = list(range(9))


@pytest.fixture
def two_threads() -> Iterator[None]:
    """This process has more threads than a job may use."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def squared(item: int) -> int:
    return item * item


def process_and_threads(item: int) -> tuple[int, int]:
    """Of whoever works on the item; as a picklable function of a module that imports torch before its first item."""
    return os.getpid(), torch.get_num_threads()


def failing_at_four(item: int) -> int:
    if item == 4:
        raise ValueError("item 4 is broken")
    return item


@pytest.mark.parametrize("workers", ["1", "3"])
def test_results_come_in_the_order_of_the_items(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", workers)
    assert list(runtime.map_parts(squared, ITEMS, what="squares")) == [item * item for item in ITEMS]


@pytest.mark.usefixtures("two_threads")
def test_every_worker_process_has_one_torch_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "2")
    workers = set(runtime.map_parts(process_and_threads, ITEMS, what="threads"))
    assert {threads for _, threads in workers} == {1}
    assert os.getpid() not in {process for process, _ in workers}


@pytest.mark.parametrize(("variable", "value"), [("TAG2MASK_LAUNCHER", "inline"), ("TAG2MASK_WORKERS", "1")])
@pytest.mark.usefixtures("two_threads")
def test_work_inside_this_process_has_one_torch_thread(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "2")
    monkeypatch.setenv(variable, value)
    assert set(runtime.map_parts(process_and_threads, ITEMS, what="threads")) == {(os.getpid(), 1)}


@pytest.mark.usefixtures("two_threads")
def test_a_stage_has_one_torch_thread_from_its_first_line_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    with runtime.stage():
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_error_in_one_item_ends_the_run(workers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", workers)
    with pytest.raises(ValueError, match="item 4 is broken"):
        list(runtime.map_parts(failing_at_four, ITEMS, what="items"))


def test_a_number_of_workers_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "many")
    with pytest.raises(SystemExit, match="TAG2MASK_WORKERS='many' is not allowed; allowed is a whole number >= 1"):
        list(runtime.map_parts(squared, ITEMS, what="squares"))


SCRIPT = """
import click
from pipeline import runtime
def broken(item):
    raise RuntimeError("photo.jpg has changed since prepare read it")
@click.command()
def main():
    with runtime.stage():
        {call}
if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("list(runtime.map_parts(broken, [1, 2, 3], what='images'))", "Error: photo.jpg has changed since prepare read it"),
        ("raise KeyError('a bug')", "Error: unexpected KeyError: 'a bug'; please report it with .work/traceback.txt"),
    ],
    ids=["in a worker process", "a bug"],
)
def test_an_error_of_a_stage_is_one_line_and_its_traceback_is_kept(tmp_path: Path, call: str, line: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(call=call), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**clean, "PYTHONPATH": str(PROJECT), "TAG2MASK_WORKERS": "2"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.strip().splitlines() == [line]
    assert "Traceback" in (tmp_path / ".work" / "traceback.txt").read_text(encoding="utf-8")
