"""Two whole chains of stages with other workers, loaders and ranks: the same bytes come out."""

from __future__ import annotations

from pathlib import Path

from tests.project_copy import Copy


def test_the_same_run_with_other_workers_loaders_and_ranks_gives_the_same_bytes(tmp_path: Path) -> None:
    other = Copy(tmp_path / "other")
    other.ran("evaluate@cam", TAG2MASK_WORKERS="3", TAG2MASK_RANKS="1", TAG2MASK_LOADERS="2")
    again = Copy(tmp_path / "again")
    again.ran("evaluate@cam", TAG2MASK_WORKERS="1", TAG2MASK_RANKS="2")
    assert other.results() == again.results()
