"""Whole chains of stages with other workers, ranks and engines: the same bytes come out."""

from __future__ import annotations

from pathlib import Path

from tests.project_copy import Copy
from tests.ray_case import two_nodes


def test_the_same_run_with_other_workers_ranks_and_hosts_gives_the_same_bytes(tmp_path: Path) -> None:
    other = Copy(tmp_path / "other")
    other.ran("evaluate@cam", TAG2MASK_WORKERS="3", TAG2MASK_RANKS="1")
    again = Copy(tmp_path / "again")
    again.ran("evaluate@cam", TAG2MASK_WORKERS="1", TAG2MASK_RANKS="2")
    assert other.results() == again.results()
    expected = again.results()
    stages = [f"{stage}@cam" for stage in ("extract", "fit_refiner", "refine", "export", "segment", "evaluate")]
    with two_nodes() as address:  # training on Ray: test_distributed.py
        again.dvc("repro", "--force", "--single-item", "prepare", *stages, TAG2MASK_ENGINE="ray", RAY_ADDRESS=address)
    assert again.results() == expected
