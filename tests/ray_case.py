"""A Ray cluster for tests, in a process of its own: pytest's is never part of one, since Ray ends what is with its nodes.

python -m tests.ray_case <nodes>    starts nodes with a core and a pretended GPU each, says where, and ends with its input
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.toys import PROJECT

STORE = 80 * 2**20  # bytes; containers have little shared memory
HANG_SECONDS = 240  # what lasts longer hangs, and fails; no assertion on speed


@dataclass(frozen=True)
class Cluster:
    """raylets: process of every node, without which the node is lost; gcs: that of the state, without which the head is."""

    address: str
    raylets: list[int]
    gcs: int

    def variables(self, **more: str) -> dict[str, str]:
        """Environment of a stage that works on the cluster."""
        return {"TAG2MASK_ENGINE": "ray", "RAY_ADDRESS": self.address, "TAG2MASK_RANKS": "2", **more}

    def computing(self) -> list[psutil.Process]:
        """Workers that have a part."""
        processes = [process for raylet in self.raylets for process in psutil.Process(raylet).children(recursive=True)]
        return [process for process in processes if name_of(process) == "ray::_compute"]


def name_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return "".join(process.cmdline())
    return ""


@contextmanager
def cluster(nodes: int) -> Iterator[Cluster]:
    with session([sys.executable, "-m", "tests.ray_case", str(nodes)], PROJECT) as host:
        assert host.stdout is not None
        lines = [host.stdout.readline()]
        while lines[-1] and not lines[-1].startswith("{"):
            lines.append(host.stdout.readline())
        assert lines[-1], "".join(lines)
        yield Cluster(**json.loads(lines[-1]))


@contextmanager
def session(command: Sequence[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A process with its output; whatever it has started ends with the context."""
    clean = {name: value for name, value in os.environ.items() if name not in ("DVC_STAGE", "RAY_ADDRESS")}
    mark = uuid.uuid4().hex  # Ray's processes lead sessions of their own, but inherit variables
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={
            **clean, "PYTHONPATH": str(PROJECT), "TAG2MASK_DEVICE": "cpu", **variables, "TAG2MASK_TEST": mark,
        },
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            for member in psutil.process_iter():
                with suppress(psutil.Error):
                    if member.environ().get("TAG2MASK_TEST") == mark:
                        member.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output of a process, which fails where it hangs."""
    try:
        output = process.communicate(timeout=HANG_SECONDS)[0]
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{process.args} hangs; so far: {error.stdout!r}")
    return process.returncode, output


def host(nodes: int) -> None:
    """Until the input ends."""
    from ray.cluster_utils import Cluster as Nodes

    settings = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": STORE, "include_log_monitor": False}
    made = Nodes(initialize_head=True, head_node_args={**settings, "include_dashboard": False})
    for _ in range(nodes - 1):
        made.add_node(**settings)
    made.wait_for_nodes()
    assert made.head_node is not None
    raylets = [node.all_processes["raylet"][0].process.pid for node in made.list_all_nodes()]
    gcs = made.head_node.all_processes["gcs_server"][0].process.pid
    sys.stdout.write(json.dumps({"address": made.address, "raylets": raylets, "gcs": gcs}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    host(int(sys.argv[1]))
