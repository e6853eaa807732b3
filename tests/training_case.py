"""A training of a few seconds, for tests of the training loop in many processes: small, since each of them imports it.

python -m tests.training_case <folder>    trains like a stage, on the images of <folder>/raw, in <folder>
"""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline import runtime
from pipeline.core.contracts import Batch, Clock, ParamGroup, Phase
from pipeline.core.records import ImageRecord
from pipeline.training import loop, resume
from pipeline.training.data import TrainingImages
from pipeline.training.settings import Augment

AUGMENT = Augment(
    size=16, scale_min=0.8, scale_max=1.5, area_min=None, flip=0.5, jitter=0.2, rand_augment=None, erase=0.0
)  # fmt: skip


class Toy(nn.Module):
    """A trainable with dropout (so that random streams matter) and a batch norm (so that buffers matter), in two phases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 2)

    def phases(self) -> list[Phase]:
        settings: dict[str, Any] = {
            "batch_size": 4, "shards": 4, "lr": 0.05, "weight_decay": 0.01, "schedule": "cosine", "warmup": 1,
        }  # fmt: skip
        return [
            Phase("first", epochs=2, optimiser="adamw", **settings),
            Phase("second", epochs=1, optimiser="sgd", restart=("head.",), **settings),
        ]

    def param_groups(self, phase: Phase) -> list[ParamGroup]:
        return [ParamGroup(list(self.parameters()), 1.0, 1.0)]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        logits = self.head(self.body(batch.images).mean(dim=(2, 3)))
        return {"tags": nn.functional.multilabel_soft_margin_loss(logits, batch.tags), "size": 0.01 * logits.square().mean()}


def records_of(root: Path) -> list[ImageRecord]:
    records = []
    for path in sorted((root / "images").glob("*.png")):
        digest = hashlib.sha256(path.read_bytes()).digest()
        records.append(ImageRecord(path.stem, f"images/{path.name}", (64, 64), "train", (len(records) % 2,), digest))
    return records


def job_in(folder: Path, root: Path, **changes: Any) -> loop.Job:
    images = TrainingImages(records_of(root), root, 2, AUGMENT, 0, None)
    job = loop.Job(build=Toy, images=images, seed=0, precision="fp32", work=folder, device="cpu", ranks=1, loaders=0)
    return dataclasses.replace(job, **changes)


def trained(job: loop.Job) -> bytes:
    training = loop.train(job)
    assert len(list(training.notes)) <= training.steps
    return bytes_of(job.work)


def bytes_of(folder: Path) -> bytes:
    return (folder / "trained.safetensors").read_bytes() + (folder / "log.csv").read_bytes()


class Signalled(Toy):
    """20 steps, of which the epochs are scored. A file named kill or stop in the folder makes rank 1 send that signal in the
    twelfth step, once: to itself, or to the process that the file names, and then it waits to see what that does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def phases(self) -> list[Phase]:
        return [dataclasses.replace(self.first_phase(), epochs=8, keep_best=("head.",))]

    def first_phase(self) -> Phase:
        return super().phases()[0]

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        rank = dist.get_rank() if dist.is_initialized() else int(multiprocessing.parent_process() is not None)
        for name, number in (("kill", signal.SIGKILL), ("stop", signal.SIGTERM)):
            if rank == 1 and clock.step == 12 and (self.folder / name).exists():
                process = (self.folder / name).read_text("utf-8")
                (self.folder / name).unlink()
                os.kill(int(process or os.getpid()), number)
                if process:
                    signal.pause()
        return super().losses(batch, clock)

    def score(self, batch: Batch) -> Tensor:
        count = len(batch.images)
        return torch.stack([-self.losses(batch, Clock(0, 0, 1))["tags"].double() * count, torch.tensor(count).double()])


def build(folder: Path) -> Signalled:
    """A checkpoint follows every step."""
    resume.CHECKPOINT_SECONDS = 0.0
    return Signalled(folder)


def signalled_job(folder: Path) -> loop.Job:
    return job_in(folder, folder.parent / "raw", build=partial(build, folder), ranks=runtime.ranks(4))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with runtime.stage():
        training = loop.train(signalled_job(folder), runtime.launch())
        runtime.info("resuming at step %d", training.done)
        for _ in training.notes:
            pass


if __name__ == "__main__":
    from tests import training_case  # so that other processes find `build` by the same name

    training_case.main()
