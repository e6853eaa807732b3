"""A worker per GPU, each with its own CUDA_VISIBLE_DEVICES, and no more ranks than GPUs. The GPUs are pretended: CUDA is
asked how many there are, and never started."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline import runtime
from pipeline.engine import ray_cluster, torchrun
from pipeline.jobs.engine import Engine
from tests.toys import PROJECT

PATIENCE = 60.0  # seconds after which a process no longer waits for another
Gpus = Callable[..., None]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    """Makes this host have so many, which CUDA_VISIBLE_DEVICES may name."""

    def make(count: int, variable: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setenv("TAG2MASK_DEVICE", "cuda")
        if variable is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)

    return make


def seen(item: int) -> tuple[int, str | None]:
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def until_all_are_there(names: list[Path]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not all(name.exists() for name in names) and time.monotonic() < deadline:
        time.sleep(0.01)


def seen_by_pairs(item: int, folder: Path) -> str:
    """The device of a worker; two of them meet at every two items, so that none can do both."""
    (folder / str(item)).touch()
    first = item // 2 * 2
    until_all_are_there([folder / str(first), folder / str(first + 1)])
    return os.environ["CUDA_VISIBLE_DEVICES"]


def killed_once(item: int, folder: Path) -> str:
    """The first process that comes to item 2 is killed, while another has item 3."""
    if item == 2 and not (folder / "killed").exists():
        until_all_are_there([folder / "3"])
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return seen_by_pairs(item, folder)


def killing_an_idle_worker(item: int, folder: Path) -> int:
    """Item 0 kills the process that has done item 1 and waits for more."""
    process, killed = folder / "process", folder / "killed"
    if item == 1:
        process.with_suffix(".new").write_text(str(os.getpid()))
        process.with_suffix(".new").replace(process)
    elif not killed.exists():
        until_all_are_there([process])
        time.sleep(0.2)
        killed.touch()
        os.kill(int(process.read_text()), signal.SIGKILL)
    return item


def test_each_gpu_that_the_user_lists_has_a_worker_that_sees_it_alone(
    gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = "GPU-8932f937, 3,-1,5"  # CUDA ends the list at what is no device
    gpus(2, listed)
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")  # of CPU parts
    results = list(runtime.map_parts(partial(seen_by_pairs, folder=tmp_path), range(4), what="parts", device="cuda"))
    assert {*results[:2]} == {*results[2:]} == {"GPU-8932f937", "3"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == listed


def test_the_replacement_of_a_killed_worker_gets_its_gpu(gpus: Gpus, tmp_path: Path) -> None:
    gpus(2)
    results = list(runtime.map_parts(partial(killed_once, folder=tmp_path), range(6), what="parts", device="cuda"))
    assert (tmp_path / "killed").exists()
    assert {*results[:2]} == {*results[2:4]} == {*results[4:]} == {"0", "1"}


def test_a_worker_that_is_killed_while_it_waits_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "2")
    function = partial(killing_an_idle_worker, folder=tmp_path)
    assert list(runtime.map_parts(function, range(2), what="parts")) == [0, 1]
    assert (tmp_path / "killed").exists()


@pytest.mark.parametrize(("count", "device"), [(1, "cuda"), (4, "cuda:2")])
def test_a_single_gpu_is_used_by_this_process(gpus: Gpus, count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(count)
    monkeypatch.setenv("TAG2MASK_WORKERS", "3")
    assert set(runtime.map_parts(seen, range(4), what="parts", device=device)) == {(os.getpid(), None)}


def test_a_gpu_that_is_not_there_is_refused(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    monkeypatch.setenv("TAG2MASK_DEVICE", "cuda:1")
    assert runtime.device() == "cuda:1"
    monkeypatch.setenv("TAG2MASK_DEVICE", "cuda:2")
    with pytest.raises(SystemExit, match="TAG2MASK_DEVICE=cuda:2 is not allowed; allowed is cuda, or cuda:0 to cuda:1"):
        runtime.device()


def test_loaders_and_processes_on_cpu_are_counted_by_variables_of_their_own(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(4)
    monkeypatch.setattr(runtime, "cores", lambda: 16)
    monkeypatch.delenv("TAG2MASK_LOADERS", raising=False)
    monkeypatch.setenv("TAG2MASK_WORKERS", "5")
    assert (runtime.loaders("cpu"), runtime.loaders("cuda"), runtime.loaders("cuda:0")) == (0, 4, 8)
    assert (runtime.workers(), runtime.workers("cuda")) == (5, 4)
    assert (runtime.beside("cpu"), runtime.beside("cuda"), runtime.beside("cuda:3")) == (0, 1, 5)
    for value in (0, 3):
        monkeypatch.setenv("TAG2MASK_LOADERS", str(value))
        assert runtime.loaders("cpu") == runtime.loaders("cuda") == value
    monkeypatch.setenv("TAG2MASK_LOADERS", "many")
    with pytest.raises(SystemExit, match="TAG2MASK_LOADERS='many' is not allowed; allowed is a whole number >= 0"):
        runtime.loaders("cpu")


def test_provenance_names_engine_processes_and_gpus(gpus: Gpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    for name, value in (("DVC_STAGE", "prepare"), ("TAG2MASK_LOADERS", "3"), ("TAG2MASK_WORKERS", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TAG2MASK_RANKS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU of model {number}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(runtime, "guard", lambda name: None)  # this process has imported far more than the stage
    monkeypatch.chdir(PROJECT)
    with runtime.stage(tmp_path):
        assert list(runtime.map_parts(str, range(3), what="parts")) == ["0", "1", "2"]
        runtime.ranks(4), runtime.loaders("cuda")
    record = json.loads((tmp_path / "prepare.json").read_text())
    names = ("device", "engine", "workers", "loaders", "ranks", "gpus", "cuda", "cudnn")
    gpu_names = ["GPU of model 0", "GPU of model 1"]
    assert [record[name] for name in names] == ["cuda", "local", 2, 3, 2, gpu_names, "13.0", 91002]
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    with runtime.stage(tmp_path):
        pass
    assert not {*names[2:]} & {*json.loads((tmp_path / "prepare.json").read_text())}


def by_ray(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("TAG2MASK_ENGINE", "ray")
    monkeypatch.setattr(ray_cluster, "places", lambda device: count)


def by_torchrun(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """This process is one of so many, all of this host."""
    monkeypatch.setattr(torchrun, "is_in_use", lambda: True)
    for name, value in (("RANK", 1), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("way", ["local", "ray"])
def test_more_ranks_than_gpus_are_an_error(gpus: Gpus, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    if way == "ray":
        by_ray(monkeypatch, 2)
    monkeypatch.setenv("TAG2MASK_RANKS", "3")
    with pytest.raises(SystemExit, match="TAG2MASK_RANKS=3 is not allowed; allowed is one per cuda device, here 1 to 2"):
        runtime.ranks(4)


def test_more_ranks_of_torchrun_than_gpus_end_before_the_stage_begins(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    by_torchrun(monkeypatch, 3)
    with (
        pytest.raises(SystemExit, match=r"started 3 ranks on this host; allowed is one per GPU: --nproc-per-node 1 to 2"),
        runtime.stage(),
    ):
        pytest.fail("the stage has begun")


@pytest.mark.parametrize("way", ["local", "ray", "torchrun"])
def test_shards_below_the_number_of_gpus_are_a_hint(
    gpus: Gpus, way: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(4)
    monkeypatch.delenv("TAG2MASK_RANKS", raising=False)
    if way == "ray":
        by_ray(monkeypatch, 4)
    elif way == "torchrun":
        by_torchrun(monkeypatch, 4)
    engine: Engine = runtime
    with caplog.at_level("INFO"):
        assert engine.ranks(4) == 4
        assert not caplog.messages
        engine.ranks(2)
    assert caplog.messages == ["2 of 4 GPUs train: as many as schedule.shards of the recipe, which is part of the result"]
