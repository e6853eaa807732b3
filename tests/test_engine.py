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

import numpy as np
import pytest

from pipeline import runtime
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ChangedImageError
from pipeline.engine import local, ray_cluster
from tests.ray_case import cluster, two_nodes
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


def written(number: int) -> int:
    """Writes a part of masks, slowly."""

    def items() -> Iterator[store.Item]:
        for image in range(4):
            time.sleep(0.05)
            yield f"{number:05d}-{image}", {"mask": np.full((8, 8), image, np.uint8)}

    store.write_part(
        store.part_path(Path(), number), store.PSEUDO_MASKS, items(), labels=LabelSpace(("cat",)), part=number, parts=12,
        params_digest="", compression="gzip",
    )  # fmt: skip
    return number


def failing(item: int) -> int:
    if item == 4:
        raise ChangedImageError("photo.jpg has changed")
    return item


def folder_of(item: int) -> tuple[str, str, str]:
    time.sleep(0.1)  # so that no worker can do all
    return str(Path.cwd()), os.environ["OMP_NUM_THREADS"], str(os.getppid())


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster of two nodes on this machine, with a core each."""
    with two_nodes() as made:
        yield made


@pytest.fixture
def on_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where workers find this file
    monkeypatch.setenv("RAY_ADDRESS", address)
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


def test_parts_of_a_node_that_is_lost_are_computed_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last test with Ray in this file: the cluster is its own."""
    import ray

    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("TAG2MASK_ENGINE", "ray")
    with cluster(3) as made:
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        results = runtime.map_parts(written, range(12), what="parts")
        first = next(results)
        made.remove_node(made.list_all_nodes()[-1], allow_graceful=False)
        assert [first, *results] == list(range(12))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"part-{number:05d}.h5" for number in range(12)]
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    monkeypatch.chdir(undisturbed)
    for number in range(12):
        written(number)
        name = f"part-{number:05d}.h5"
        assert (undisturbed / name).read_bytes() == (tmp_path / name).read_bytes()


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
