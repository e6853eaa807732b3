"""Parts of work → results in their order, by tasks on a Ray cluster whose nodes all see the project folder.

Nothing large goes through Ray's object store: a task reads its inputs from the project folder and writes its part there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pipeline.engine.ray_cluster import connect, places
from pipeline.engine.ray_node import Origin, arrive, origin

In = TypeVar("In")
Out = TypeVar("Out")

RETRIES = 3  # of a part whose worker or node is lost
LOOK_SECONDS = 20  # without a result, until the cluster is asked whether it has a place to compute at all


def map_parts(function: Callable[[In], Out], parts: Sequence[In], device: str) -> Iterator[Out]:
    """function(part) for every part, at most two parts per core or GPU in flight. A part whose worker or node is lost is
    computed again elsewhere; what `function` raises is raised here, and is not tried again.

    RuntimeError where a part was lost RETRIES times, or no node has the resources. After an error, parts in flight are not
    cancelled, since Ray 2.60 kills the driver where the worker of a task that it cancels has just died; Ray itself ends them
    with the stage.
    """
    ray = connect()
    workers = _workers(device)
    submit = _submitter(ray, function, device, workers)
    running: dict[Any, tuple[int, int]] = {}  # reference → numbers of the part and of the place that computes it
    done: dict[int, Out] = {}
    submitted = returned = 0
    while returned < len(parts):
        while submitted < len(parts) and len(running) + len(done) < 2 * workers + 2:
            waiting = Counter(place for _, place in running.values())
            place = min(range(workers), key=lambda number: waiting[number])
            running[submit(parts[submitted], place)] = submitted, place
            submitted += 1
        finished, _ = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS)
        for reference in finished:
            done[running.pop(reference)[0]] = _result(ray, reference)
        if not finished:
            _workers(device)
        while returned in done:
            yield done.pop(returned)
            returned += 1


def _workers(device: str) -> int:
    """How many parts the cluster can compute at a time. RuntimeError: none."""
    count = places(device)
    if not count:
        noun = "CPU" if device == "cpu" else "GPU"
        raise RuntimeError(f"no node of the Ray cluster has a {noun}; what is finished is kept; see `ray status`")
    return count


def _submitter(ray: Any, function: Callable[[In], Out], device: str, workers: int) -> Callable[[In, int], Any]:
    """(part, number of a place) → reference of its result. A GPU is a place, with an actor, so that the model that it loaded
    stays there; Ray itself chooses the core."""
    shared, at = ray.put(function), ray.put(origin())  # the function holds the job, which is the same for all parts
    if device == "cpu":
        task = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=False)(_compute)
        return lambda part, place: task.remote(shared, part, at)
    make = ray.remote(num_cpus=1, num_gpus=1, max_restarts=RETRIES, max_task_retries=RETRIES)(_GpuWorker)
    actors = [make.remote() for _ in range(workers)]
    return lambda part, place: actors[place].compute.remote(shared, part, at)


class _GpuWorker:
    """An actor: Ray lets it see its GPU alone."""

    def compute(self, function: Callable[[In], Out], part: In, origin: Origin) -> Out:
        return _compute(function, part, origin)


def _compute(function: Callable[[In], Out], part: In, origin: Origin) -> Out:
    """In a worker."""
    arrive(origin)
    return function(part)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if error.cause is None:  # could not be pickled
            raise RuntimeError(f"a part failed on the Ray cluster: {error}") from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"a part was lost {RETRIES + 1} times on the Ray cluster ({type(error).__name__}): its memory may have run out; "
            "what is finished is kept; see `ray status` and `ray logs`"
        ) from error
