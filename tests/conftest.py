"""One torch thread per test process, as in every process of the pipeline; files that take minutes begin first."""

from __future__ import annotations

import os
import sys

import pytest

from pipeline.runtime import one_thread

LONG = ("test_same_bytes.py", "test_end_to_end.py", "test_distributed.py", "test_matrix.py")

one_thread()  # `-n 2` shares the cores between processes
for variable in ("TAG2MASK_WORKERS", "TAG2MASK_RANKS"):  # starting processes takes longer than all else that toys do
    os.environ.setdefault(variable, "1")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Ray ends what is part of a cluster when its node goes: pytest's process must not be (tests/ray_case.py)."""
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized(), f"{item.nodeid} has made this process part of a Ray cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadfile` a long file that begins last leaves the other process idle."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
