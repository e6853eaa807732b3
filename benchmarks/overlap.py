"""`python -m benchmarks.overlap`: share of the time in which the device computes, while threads decode and write beside it.

The device is a pretended one: a forward sleeps, and so needs no core. Its time is that of score_maps.score_views and of
segment.mean_softmax, all of whose tensors are on the device: the forward, and what merges views.
"""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import CLASSES, SIZE, photograph
from pipeline.core.contracts import ScoreMaps
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract, Segment
from pipeline.jobs import score_maps, segment

LABELS = LabelSpace(tuple(f"class {number:02d}" for number in range(CLASSES)))
CELL = 16  # px


class Sleeping:
    """A method and a segmenter whose forward takes `seconds` an image."""

    stride = CELL

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score_maps(self, batch: Tensor, options: object, *, keep_affinity: bool) -> ScoreMaps:
        count, (h, w) = len(batch), batch.shape[-2:]
        time.sleep(self.seconds * count / 2)  # the other half are mirror images
        scores = torch.rand(count, CLASSES, h // CELL, w // CELL)
        return ScoreMaps(scores=scores, tag_logits=torch.zeros(count, CLASSES), affinity=None, decoded=None)

    def segment(self, batch: Tensor, options: object) -> Tensor:
        time.sleep(self.seconds * len(batch))
        small = torch.rand(len(batch), CLASSES + 1, batch.shape[-2] // 4, batch.shape[-1] // 4)
        return torch.nn.functional.interpolate(small, batch.shape[-2:], mode="nearest")


def draw(root: Path, count: int) -> list[ImageRecord]:
    """`count` photographs as JPEG files, tagged with two classes."""
    root.mkdir()
    drawn = []
    for index in range(count):
        path = root / f"{index:04d}.jpg"
        Image.fromarray(photograph(index)).save(path, quality=95)
        sha256 = hashlib.sha256(path.read_bytes()).digest()
        drawn.append(ImageRecord(path.stem, path.name, SIZE, "train", (index % CLASSES, (index + 7) % CLASSES), sha256))
    return sorted(drawn, key=lambda record: record.id)


def stages(folder: Path, records: list[ImageRecord]) -> dict[str, Callable[[int], None]]:
    """What writes a part with so many loaders, by the stage's name."""
    extraction = Extract((1.0,), None, True, "irn", 4, 16, 0.5, False, "fp32", 1000, "gzip", 0, {})
    extract = score_maps.Job(
        method="sleeping", backbone="none", model=folder, settings=extraction, options=None, root=folder / "images",
        labels=LABELS, parts=1, params_digest="", out=folder / "scoremaps", device="cpu",
    )  # fmt: skip
    segmentation = Segment(
        scales=(1.0,), flip=False, short_side=None, window=512, window_stride=512, precision="fp32", crf=None,
        images_per_part=1000, compression="gzip", options={},
    )  # fmt: skip
    predict = segment.Job(
        segmenter="sleeping", weights=folder, settings=segmentation, crf=None, options=None, root=folder / "images",
        labels=LABELS, parts=1, params_digest="", out=folder / "predictions", device="cpu",
    )  # fmt: skip
    return {
        "extract": lambda loaders: _done(
            score_maps.extract_part((0, records), dataclasses.replace(extract, loaders=loaders))
        ),
        "segment": lambda loaders: _done(segment.segment_part((0, records), dataclasses.replace(predict, loaders=loaders))),
    }


def _done(images: int) -> None:
    assert images


def measured(stage: Callable[[int], None], loaders: int, seconds: float) -> tuple[float, float]:
    """Share of the device's time in that of the part, and seconds of the part."""
    network, busy = Sleeping(seconds), []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **named)
            busy.append(time.perf_counter() - started)
            return result

        return call

    with (
        patch.object(score_maps, "load", lambda *_: network),
        patch.object(segment, "load", lambda *_: network),
        patch.object(score_maps, "score_views", timed(score_maps.score_views)),
        patch.object(segment, "mean_softmax", timed(segment.mean_softmax)),
    ):
        started = time.perf_counter()
        stage(loaders)
        whole = time.perf_counter() - started
    return sum(busy) / whole, whole


@click.command()
@click.option("--images", default=96, show_default=True)
@click.option("--milliseconds", default=25.0, show_default=True, help="of a forward, per image")
@click.option("--rounds", default=3, show_default=True, help="of both in turn; the median counts")
def main(images: int, milliseconds: float, rounds: int) -> None:
    """Share of the device's time with 0 and with 2 loaders."""
    torch.set_num_threads(1)
    table = Table("stage", "device's share in line", "with 2 loaders", "times as fast")
    with tempfile.TemporaryDirectory() as folder:
        records = draw(Path(folder) / "images", images)
        for name, stage in stages(Path(folder), records).items():
            pairs = [[measured(stage, loaders, milliseconds / 1000) for loaders in (0, 2)] for _ in range(rounds)]
            in_line, beside = (statistics.median(pair[at][0] for pair in pairs) for at in (0, 1))
            faster = statistics.median(pair[0][1] / pair[1][1] for pair in pairs)
            table.add_row(name, f"{in_line:.1%}", f"{beside:.1%}", f"{faster:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
