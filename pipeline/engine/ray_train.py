"""Ranks as workers of Ray Train, on whatever cluster RAY_ADDRESS names: the stage itself is no rank, it shows the progress.

All nodes see the project folder under the same path.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from pipeline.core.processes import Interrupted, StopRequest, stop_on_signal
from pipeline.engine.ray_cluster import connect
from pipeline.engine.ray_node import arrive, origin

Run = Callable[[Any, str, StopRequest], Iterator[str]]  # (job, torch device of the rank, stop) → notes

POLL_SECONDS = 0.5


class Board:
    """An actor, by which rank 0 and the stage know of each other."""

    def __init__(self) -> None:
        self._notes: list[str] = []
        self._stop = False
        self._errors: list[str] = []
        self._interrupted = ""

    def post(self, notes: list[str]) -> bool:
        """Of rank 0: the notes of its last steps → whether it is to stop."""
        self._notes += notes
        return self._stop

    def fail(self, text: str) -> None:
        self._errors.append(text)

    def interrupted(self, text: str) -> None:
        self._interrupted = text

    def stop(self) -> None:
        self._stop = True

    def notes(self) -> list[str]:
        """Those since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def outcome(self) -> tuple[str, str]:
        """The first error and how the run was interrupted, in words, or "" of what was not."""
        return self._errors[0] if self._errors else "", self._interrupted


def launch(run: Run, job: Any) -> Iterator[str]:
    """Has run(job, device, stop) called in job.ranks workers, ranks of torch.distributed's default group → notes of rank 0.

    A signal makes rank 0 save, and raises Interrupted. RuntimeError of what made a rank fail, without a second try: the next
    run goes on from the last checkpoint.
    """
    ray = connect()
    board = ray.remote(num_cpus=0)(Board).remote()
    with ThreadPoolExecutor(1) as thread, stop_on_signal() as stop:  # in the main thread Ray Train takes SIGINT for itself
        training = thread.submit(_trainer(run, job, board).fit)
        try:
            while not training.done():
                wait([training], timeout=POLL_SECONDS)
                yield from ray.get(board.notes.remote())
                if stop.made:
                    ray.get(board.stop.remote())
        finally:
            ray.get(board.stop.remote())  # where nobody reads the notes any more
            wait([training])
        yield from ray.get(board.notes.remote())
        _raise_failure(training, *ray.get(board.outcome.remote()))


def _trainer(run: Run, job: Any, board: Any) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers work in the project folder
    on_cpu = job.device == "cpu"
    return TorchTrainer(
        _work,
        train_loop_config={"run": run, "job": job, "board": board, "origin": origin()},
        torch_config=TorchConfig(backend="gloo" if on_cpu else "nccl"),
        scaling_config=ScalingConfig(num_workers=job.ranks, use_gpu=not on_cpu, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(job.work.resolve() / "ray"), failure_config=FailureConfig(max_failures=0)),
    )


def _work(config: dict[str, Any]) -> None:
    """The life of one rank."""
    import ray
    from ray.train import get_context
    from ray.train.torch import get_device

    board, first, stop = config["board"], get_context().get_world_rank() == 0, StopRequest()
    notes: list[str] = []
    posted = time.monotonic()
    try:
        arrive(config["origin"])
        for note in config["run"](config["job"], str(get_device()), stop):
            notes.append(note)
            if first and time.monotonic() - posted > POLL_SECONDS:
                stop.made = bool(ray.get(board.post.remote(notes)))
                notes, posted = [], time.monotonic()
    except Interrupted as interrupt:
        if first:
            ray.get(board.interrupted.remote(str(interrupt)))
    except Exception as error:
        ray.get(board.fail.remote(str(error)))
        raise
    finally:
        if first:
            ray.get(board.post.remote(notes))


def _raise_failure(training: Future[Any], error: str, interrupted: str) -> None:
    if interrupted:
        raise Interrupted(interrupted)
    if failure := training.exception():
        raise RuntimeError(error or f"Ray Train: {failure}") from failure
