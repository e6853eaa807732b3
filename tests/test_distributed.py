"""A training on many ranks, processes and hosts: the same bytes as in one process, and what happens where a rank dies."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import runtime
from pipeline.jobs import fit_refiner, train
from pipeline.training import loop, process_group, shared_memory, spawn
from pipeline.training.exchange import OtherRankFailed
from tests.ray_case import Cluster, cluster, ended, session
from tests.toys import PROJECT, toy_folder
from tests.training_case import bytes_of, job_in, signalled_job, trained

ONE_HOST = ["--standalone"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    toy_folder(folder / "raw", train=10, val=0)
    return folder


@pytest.fixture(scope="module")
def alone(shared: Path) -> bytes:
    """20 steps in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAG2MASK_DEVICE", "cpu")
        patch.setenv("TAG2MASK_RANKS", "1")
        return trained(signalled_job(shared / "alone"))


def start(folder: Path, words: list[str], **variables: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    return subprocess.Popen(
        [sys.executable, "-m", *words, str(folder)], cwd=folder.parent, stderr=subprocess.PIPE, text=True,
        env={**clean, "PYTHONPATH": str(PROJECT), "TAG2MASK_DEVICE": "cpu", **variables},
    )  # fmt: skip


def torchrun(folder: Path, ranks: int, *options: str) -> subprocess.Popen[str]:
    """ranks: of this host."""
    command = ["torch.distributed.run", f"--nproc-per-node={ranks}", *(options or ONE_HOST), "-m", "--"]
    return start(folder, [*command, "tests.training_case"])


def messages(process: subprocess.Popen[str]) -> str:
    return process.communicate()[1]


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.setenv("TAG2MASK_RANKS", "2")


@pytest.mark.usefixtures("two_ranks")
def test_two_processes_that_share_memory_end_with_the_bytes_of_one(shared: Path, alone: bytes) -> None:
    assert trained(signalled_job(shared / "two")) == alone


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("through", ["shared memory", "gloo"])
def test_a_killed_process_ends_the_run_at_once_and_the_next_goes_on_to_the_same_bytes(
    shared: Path, alone: bytes, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if through == "gloo":
        monkeypatch.setattr(shared_memory, "fits", lambda ranks, size: False)
    job = signalled_job(shared / f"killed, {through}")
    job.work.mkdir()
    (job.work / "kill").touch()
    with pytest.raises(OtherRankFailed, match=r"rank 1 was killed by signal 9.*run again to go on from the last checkpoint"):
        trained(job)
    assert loop.train(job).done == 12
    assert trained(job) == alone


def test_shared_memory_is_asked_for_the_ranks_rows_and_no_more() -> None:
    assert shared_memory.fits(2, 1000)
    assert not shared_memory.fits(2, 2**50)


def test_torchrun_with_two_and_four_ranks_side_by_side_ends_with_the_same_bytes(shared: Path, alone: bytes) -> None:
    """Six processes: each is load on the cores of the others. SIGTERM in one rank of the two ends its run in order first."""
    two, four = shared / "torchrun-2", shared / "torchrun-4"
    two.mkdir()
    (two / "stop").touch()
    beside, stopped = torchrun(four, 4), torchrun(two, 2)
    text = messages(stopped)
    assert "interrupted at step 13 of 20; saved; run again to go on" in text.splitlines() and stopped.returncode
    again = torchrun(two, 2)
    text = messages(again)
    assert again.returncode == 0 and "resuming at step 13" in text.splitlines(), text
    text = messages(beside)
    assert beside.returncode == 0, text
    assert bytes_of(two) == alone and bytes_of(four) == alone


def test_stages_start_their_trainings_as_the_engine_says(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[loop.Job] = []

    def launch(run: Any, job: loop.Job) -> Iterator[str]:
        assert run is process_group.run
        started.append(job)
        yield from spawn.run(job, job.build())

    monkeypatch.setattr(runtime, "launch", lambda: launch)
    monkeypatch.chdir(tmp_path)
    first, second = (job_in(Path(".work") / name, shared / "raw") for name in ("first", "second"))
    train.train(first, {}, model=Path("model.safetensors"), log=Path("log.csv"), engine=runtime, what="train")
    fit_refiner.train(second, runtime, "fit_refiner")
    assert started == [first, second]


@pytest.fixture
def hosts() -> list[str]:
    """torchrun's options on each of two hosts, which meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=toy"]


def test_a_rank_killed_on_one_host_ends_both_and_the_next_run_goes_on_to_the_same_bytes(
    shared: Path, alone: bytes, hosts: list[str]
) -> None:
    folder = shared / "hosts"
    folder.mkdir()
    (folder / "kill").touch()
    first, second = torchrun(folder, 1, *hosts), torchrun(folder, 1, *hosts)
    texts = messages(first) + messages(second)
    assert first.returncode and second.returncode
    assert "Error: another process of this training failed" in texts, texts
    first, second = torchrun(folder, 1, *hosts), torchrun(folder, 1, *hosts)
    texts = messages(first) + messages(second)
    assert (first.returncode, second.returncode) == (0, 0), texts
    assert "resuming at step 12" in texts.splitlines()
    assert bytes_of(folder) == alone


def on_ray(nodes: Cluster, folder: Path, **variables: str) -> tuple[int, str]:
    """Exit code and output of a training whose two ranks are workers of Ray Train."""
    command = [sys.executable, "-m", "tests.training_case", str(folder)]
    with session(command, folder.parent, **nodes.variables(**variables)) as process:
        return ended(process)


def test_a_killed_worker_of_ray_train_ends_the_run_and_the_next_ends_with_the_same_bytes(shared: Path, alone: bytes) -> None:
    folder = shared / "ray"
    folder.mkdir()
    (folder / "kill").touch()
    with cluster(2) as nodes:
        code, output = on_ray(nodes, folder)
        assert code == 1 and "Error: another process of this training failed" in output, output
        code, output = on_ray(nodes, folder)
        assert code == 0 and "resuming at step 12" in output.splitlines(), output
    assert bytes_of(folder) == alone


def test_a_killed_head_of_the_cluster_ends_the_run_and_the_next_ends_with_the_same_bytes_without_ray(
    shared: Path, alone: bytes
) -> None:
    folder = shared / "head"
    folder.mkdir()
    with cluster(2) as nodes:
        (folder / "kill").write_text(str(nodes.gcs), encoding="utf-8")
        code, output = on_ray(nodes, folder, RAY_gcs_rpc_server_reconnect_timeout_s="5")  # 30 unless said
        assert code and "Failed to connect to GCS within 5 seconds" in output and "Traceback" not in output, output
    again = start(folder, ["tests.training_case"], TAG2MASK_RANKS="1")
    text = messages(again)
    assert again.returncode == 0 and "resuming at step 12" in text.splitlines(), text
    assert bytes_of(folder) == alone
