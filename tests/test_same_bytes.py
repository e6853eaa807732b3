"""Whole chains of stages with other workers, loaders, ranks and engines, and stages that lose a worker or a node: the same
bytes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline import runtime
from tests.project_copy import Copy
from tests.ray_case import Cluster, cluster, ended, session


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Every stage of a run, by one process."""
    copy = Copy(tmp_path_factory.mktemp("project") / "copy")
    copy.ran("evaluate@cam", TAG2MASK_WORKERS="1", TAG2MASK_RANKS="1")
    return copy


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(2) as nodes:
        yield nodes


def test_three_workers_with_two_loaders_and_two_ranks_give_the_same_bytes(done: Copy, tmp_path: Path) -> None:
    other = Copy(tmp_path / "copy")
    other.ran("evaluate@cam", TAG2MASK_WORKERS="3", TAG2MASK_LOADERS="2", TAG2MASK_RANKS="2")
    assert other.results() == done.results()


def test_a_ray_cluster_of_two_nodes_gives_the_same_bytes(done: Copy, nodes: Cluster, tmp_path: Path) -> None:
    other = Copy(tmp_path / "copy")
    other.ran("evaluate@cam", **nodes.variables())
    assert other.results() == done.results()


def start(name: str, done: Copy, nodes: Cluster) -> tuple[list[str], dict[str, str], dict[Path, bytes]]:
    """Command and variables of a finished stage, and what its outs were, which are gone now."""
    outs = {file: file.read_bytes() for out in runtime.outs_of(name, done.folder) for file in files_of(out)}
    for out in runtime.outs_of(name, done.folder):
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    words, _ = runtime.stage_command(name, done.folder, Path())
    return [sys.executable, *words[1:]], nodes.variables(PYTHONPATH="."), outs


def files_of(out: Path) -> list[Path]:
    return sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]


def test_a_worker_of_ray_killed_in_refine_changes_no_byte(done: Copy, nodes: Cluster) -> None:
    command, variables, outs = start("refine@cam", done, nodes)
    with session(command, done.folder, **variables) as stage:
        while not (workers := nodes.computing()):
            assert stage.poll() is None
        workers[0].kill()
        code, output = ended(stage)
    assert code == 0, output
    assert {file: file.read_bytes() for file in outs} == outs


def test_a_node_of_ray_killed_in_extract_changes_no_byte(done: Copy, nodes: Cluster) -> None:
    """The last test of the cluster."""
    command, variables, outs = start("extract@cam", done, nodes)
    with session(command, done.folder, **variables) as stage:
        while not nodes.computing():
            assert stage.poll() is None
        psutil.Process(nodes.raylets[-1]).kill()
        code, output = ended(stage)
    assert code == 0, output
    assert {file: file.read_bytes() for file in outs} == outs
