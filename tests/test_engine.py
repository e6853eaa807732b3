"""Parts of work are computed by processes of this host or by a Ray cluster; a process that is killed loses nothing."""

from __future__ import annotations

import ast
import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from pipeline import runtime
from pipeline.core.records import ChangedImageError
from pipeline.engine import local, ray_cluster
from tests.toys import PROJECT

SOURCES = sorted(path for folder in ("pipeline", "stages") for path in (PROJECT / folder).rglob("*.py"))


def killed_once(item: int, marker: Path) -> int:
    """The first process that comes to item 3 is killed."""
    if item == 3:
        try:
            marker.touch(exist_ok=False)
        except FileExistsError:
            return item * item
        os.kill(os.getpid(), signal.SIGKILL)
    return item * item


def killed(item: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return item


def failing(item: int) -> int:
    if item == 4:
        raise ChangedImageError("photo.jpg has changed")
    return item


def folder_of(item: int) -> tuple[str, str, str]:
    time.sleep(0.1)  # so that no worker can do all
    return str(Path.cwd()), os.environ["OMP_NUM_THREADS"], str(os.getppid())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a Ray cluster of two nodes on this machine, with a core each."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    nodes.wait_for_nodes()
    yield nodes.address
    import ray

    ray.shutdown()
    nodes.shutdown()


@pytest.fixture
def on_ray(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find this file
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setenv("TAG2MASK_ENGINE", "ray")


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "2")
    if engine == "ray":
        request.getfixturevalue("on_ray")
    function = partial(killed_once, marker=tmp_path / "killed")
    assert list(runtime.map_parts(function, range(12), what="squares")) == [item * item for item in range(12)]
    assert (tmp_path / "killed").exists()


def test_workers_that_are_killed_again_and_again_end_the_work_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"killed 3 times in a row.*TAG2MASK_WORKERS"):
        list(local.map_parts(killed, range(4), 2))


def test_a_part_that_kills_every_ray_worker_ends_the_work_with_what_to_do(on_ray: None) -> None:
    with pytest.raises(RuntimeError, match=r"a part was lost 4 times.*memory"):
        list(runtime.map_parts(killed, range(1), what="killed"))


def test_an_error_reads_the_same_under_ray(on_ray: None) -> None:
    with pytest.raises(ChangedImageError, match=r"^photo.jpg has changed$"):
        list(runtime.map_parts(failing, range(8), what="failing"))


def test_ray_workers_of_all_nodes_work_in_the_project_folder_with_one_thread(
    on_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    results = list(runtime.map_parts(folder_of, range(12), what="folders"))
    assert {(folder, threads) for folder, threads, _ in results} == {(str(tmp_path), "1")}
    assert len({node for _, _, node in results}) == 2  # each node has a process that starts its workers


def test_a_node_that_does_not_see_the_project_folder_is_named(
    on_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(Path, "cwd", lambda: gone)
    with pytest.raises(ValueError, match=r"does not see the project folder .*gone"):
        list(runtime.map_parts(failing, range(2), what="parts"))


def test_no_module_imports_ray_before_it_is_asked_for() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text("utf-8"))
        imported = [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
        imported += [str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert not [name for name in imported if name.split(".")[0] == "ray"], path


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"TAG2MASK_ENGINE=ray needs Ray: pip install 'tag2mask\[ray\]'"):
        ray_cluster.connect()
