"""A Trainable + images → trained weights and a CSV of losses. One loop for methods, learned refiners and segmenters.

A step is cut into `shards`; every shard is computed by itself, with one torch thread, and their gradients are summed along a
fixed tree. Ranks (processes, of one or several hosts) only share out the shards, so the result does not depend on how many
there are.

A phase with `keep_best` is scored after each epoch, on a few training images that are always the same, each seen in the same
crop without augmentation, shared out over the ranks as shards are. It ends with the weights of the best epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.core.contracts import Phase
from pipeline.core.processes import StopRequest
from pipeline.training import process_group, spawn, threads
from pipeline.training.epochs import steps_before
from pipeline.training.job import Job as Job
from pipeline.training.resume import Checkpoint
from pipeline.training.run import CHECKPOINT

Launch = Callable[[Callable[[Job, str, StopRequest], Iterator[str]], Job], Iterator[str]]


@dataclass(frozen=True)
class Training:
    """A job that is ready to run or resume.

    phases  in their order
    images  number of training images
    steps   of all phases together
    done    steps that an earlier run of the same job has made; this one goes on from there
    notes   runs the job as it is read: a short note, the losses, after each step
    """

    phases: Sequence[Phase]
    images: int
    steps: int
    done: int
    notes: Iterator[str]


def train(job: Job, launch: Launch | None = None) -> Training:
    """Builds the trainable. Its run leaves `trained.safetensors` and `log.csv` in job.work. ValueError without an image.

    launch: has a function called with job, device and stop request in job.ranks processes, which are ranks of
    torch.distributed's default group, and passes on the notes of rank 0. None starts processes of this host.

    A signal that asks the run to end (SIGINT, SIGTERM) makes it save a checkpoint after the current step and raise
    Interrupted. What another rank raised, the run raises.
    """
    if not len(job.images):
        raise ValueError("there is no training image: records.h5 has none in split train that can be used here")
    threads.single()
    trainable = job.build()
    phases, images = trainable.phases(), len(job.images)
    phase, step = Checkpoint.position(job.work / CHECKPOINT)
    done = steps_before(phases, phase, images) + step
    notes = spawn.run(job, trainable) if launch is None else launch(process_group.run, job)
    return Training(phases, images, steps_before(phases, len(phases), images), done, notes)
