"""Parts of work are computed by processes of this host or by a Ray cluster; a process that is killed loses nothing."""

from __future__ import annotations

import ast
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipeline import runtime
from pipeline.engine import local, ray_cluster
from tests.engine_case import RESULTS, killed, killed_once, written
from tests.ray_case import cluster, ended, session
from tests.toys import PROJECT

SOURCES = sorted(path for folder in ("pipeline", "stages") for path in (PROJECT / folder).rglob("*.py"))
SQUARES = [item * item for item in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("project")


@pytest.fixture(scope="module")
def on_ray(folder: Path) -> dict[str, Any]:
    """Case → result, on a cluster of three nodes with a core and a pretended GPU each, of which one is lost in the last."""
    with cluster(3) as nodes:
        command = [sys.executable, "-m", "tests.engine_case", str(folder), str(nodes.raylets[-1])]
        with session(command, folder, **nodes.variables()) as driver:
            code, output = ended(driver)
    assert code == 0, output
    return json.loads((folder / RESULTS).read_text("utf-8"))


def test_a_worker_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "2")
    function = partial(killed_once, marker=tmp_path / "killed")
    assert list(runtime.map_parts(function, range(12), what="squares")) == SQUARES
    assert (tmp_path / "killed").exists()


def test_workers_that_are_killed_again_and_again_end_the_work_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"killed 3 times in a row.*TAG2MASK_WORKERS"):
        list(local.map_parts(killed, range(4), 2))


def test_ray_workers_of_all_nodes_work_in_the_project_folder_with_one_thread(on_ray: dict[str, Any], folder: Path) -> None:
    places = on_ray["places"]
    assert {(place["folder"], place["OMP_NUM_THREADS"]) for place in places} == {(str(folder), "1")}
    assert len({place["node"] for place in places}) == 3  # each node has a process that starts its workers


def test_a_gpu_of_the_cluster_has_a_ray_worker_that_sees_it_alone_and_stays(on_ray: dict[str, Any]) -> None:
    places = on_ray["places on GPUs"]
    assert {place["CUDA_VISIBLE_DEVICES"] for place in places} == {"0"}
    assert len({place["process"] for place in places}) == len({place["node"] for place in places}) == 3


def test_the_device_is_the_clusters_not_that_of_the_host_that_runs_the_stage(on_ray: dict[str, Any]) -> None:
    auto, cpu, cuda, second = on_ray["devices"]
    assert (auto, cpu, cuda) == ("cuda", "cpu", "cuda")
    assert "TAG2MASK_DEVICE=cuda:1 is not allowed with TAG2MASK_ENGINE=ray" in second


@pytest.mark.parametrize(
    ("case", "marker"), [("a worker killed once", "killed"), ("a GPU's worker killed once", "killed too")]
)
def test_a_ray_worker_that_is_killed_is_replaced_and_nothing_is_lost(
    on_ray: dict[str, Any], folder: Path, case: str, marker: str
) -> None:
    assert on_ray[case] == SQUARES and (folder / marker).exists()


def test_a_part_that_kills_every_ray_worker_ends_the_work_with_what_to_do(on_ray: dict[str, Any]) -> None:
    message = on_ray["every worker killed"]
    assert message.startswith("RuntimeError: a part was lost 4 times on the Ray cluster") and "memory" in message


def test_an_error_reads_the_same_under_ray(on_ray: dict[str, Any]) -> None:
    assert on_ray["an error"] == "ChangedImageError: photo.jpg has changed"


def test_a_node_that_does_not_see_the_project_folder_is_named(on_ray: dict[str, Any]) -> None:
    message = on_ray["a folder that nodes do not see"]
    assert message.startswith("ValueError: node ") and "does not see the project folder" in message


def test_a_node_with_another_version_of_the_code_is_named(on_ray: dict[str, Any]) -> None:
    message = on_ray["other code"]
    assert message.startswith("ValueError: node ") and "has another version of tag2mask" in message


def test_parts_of_a_node_that_is_lost_are_computed_elsewhere(
    on_ray: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on_ray["a node lost"] == list(range(12))
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        written(number)
    undisturbed = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / "parts").iterdir()} == undisturbed


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


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "a stage runs on a node of the cluster"),
    ],
)
def test_an_address_without_a_cluster_is_named_at_once(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=message):
        ray_cluster.connect()


def test_a_cluster_of_ray_start_that_asks_for_a_token_says_so_and_lets_in_who_has_it(tmp_path: Path) -> None:
    head = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=6397", "--num-cpus=1"]
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef"}
    command = [sys.executable, "-c", "from pipeline.engine import ray_cluster; print(ray_cluster.places('cpu'), 'core')"]
    address = {"RAY_ADDRESS": "127.0.0.1:6397", "HOME": str(tmp_path)}
    with session([*head, "--include-dashboard=false", "--disable-usage-stats"], tmp_path, **token) as cluster_head:
        assert cluster_head.stdout is not None
        assert any("Ray runtime started" in line for line in cluster_head.stdout)
        for mode in ("disabled", "token"):  # without a token, whatever the mode
            with session(command, tmp_path, **address, RAY_AUTH_MODE=mode) as stranger:
                code, output = ended(stranger)
            assert code and "export RAY_AUTH_MODE=token" in output, output
        with session(command, tmp_path, **address, **token) as guest:
            assert "1 core" in ended(guest)[1]
