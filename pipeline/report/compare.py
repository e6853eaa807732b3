"""Figures of another git revision, read through DVC, and current ones → a page of differences by run, class and image."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline import metrics_file
from pipeline.report import rows as audit_rows
from pipeline.report import run_metrics, templates
from pipeline.stage_order import STAGES

TEMPLATE = "against.html.jinja"
LISTED = 30  # images with the largest gains, and as many with the largest losses
MIN_CHANGE = 0.005  # of mIoU or score: an image with a smaller change counts as unchanged

Pair = tuple[float | None, float | None]  # a figure of the revision and the current one; None where there is none


class Reader(Protocol):
    """Text of a file of the revision; FileNotFoundError where it has none."""

    def __call__(self, path: Path) -> str: ...


@dataclass(frozen=True)
class ImageChange:
    """One image at one stage. figure: "mIoU", or "score" where either has no ground truth; before, now: its values, 0..1."""

    id: str
    stage: str
    figure: str
    before: float
    now: float

    @property
    def change(self) -> float:
        return self.now - self.before


@dataclass(frozen=True)
class RunComparison:
    """A run at the revision and now.

    stages     stage → mIoU
    classes    stage → class → IoU
    gained     images with the largest gains, descending; at most LISTED
    lost       images with the largest losses, descending; at most LISTED
    counts     images that gained, lost, are unchanged
    unmatched  rows of the revision alone, current rows alone
    note       how the schema of the revision's metrics differs from the current one, in a sentence; "" where it does not
    """

    stages: Mapping[str, Pair]
    classes: Mapping[str, Mapping[str, Pair]]
    gained: Sequence[ImageChange]
    lost: Sequence[ImageChange]
    counts: tuple[int, int, int]
    unmatched: tuple[int, int]
    note: str


def revision(rev: str) -> Reader:
    """Reads files of a git revision of this repository, from git or from DVC's cache."""
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import SCMError

    def read(path: Path) -> str:
        try:
            return dvc.api.read(path.as_posix(), rev=rev, encoding="utf-8")
        except FileNotFoundError:
            raise
        except SCMError as error:
            raise ValueError(f"--against {rev}: {error}; allowed is any name of a git revision") from error
        except DvcException as error:
            raise FileNotFoundError(
                f"{path} of {rev} is neither in git nor in DVC's cache ({error}); try `dvc fetch`"
            ) from error

    return read


def compare(methods: Sequence[str], metrics: Path, audit: Path, read: Reader) -> dict[str, RunComparison | None]:
    """Run → its comparison; None where the revision lacks it. FileNotFoundError if it lacks all of them.

    A revision's metrics may be of an older version: IoU of stages and classes have the same keys in all versions.
    """
    comparisons: dict[str, RunComparison | None] = {}
    for method, now in run_metrics.read(metrics, methods).items():
        try:
            before = json.loads(read(metrics / f"{method}.json"))
        except FileNotFoundError:
            comparisons[method] = None
            continue
        note = metrics_file.version_difference(before)
        comparisons[method] = _comparison(before, now, *_rows(audit / f"{method}.csv", read), note)
    if not any(comparisons.values()):
        raise FileNotFoundError(f"the revision has no metrics of {', '.join(methods)} under {metrics}")
    return comparisons


def _rows(path: Path, read: Reader) -> tuple[Iterable[audit_rows.Row], Iterable[audit_rows.Row]]:
    """Rows of the revision, current rows; neither where the revision has no such table."""
    try:
        text = read(path)
    except FileNotFoundError:
        return [], []
    return audit_rows.parse(io.StringIO(text, newline=""), f"{path} of the revision"), audit_rows.read(path)


def _comparison(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    rows: Iterable[audit_rows.Row],
    rows_now: Iterable[audit_rows.Row],
    note: str,
) -> RunComparison:
    stages = [stage for stage in STAGES if stage in before["stages"] or stage in now["stages"]]
    pairs = {stage: tuple(figures["stages"].get(stage, {}) for figures in (before, now)) for stage in stages}
    images, unmatched = _images(rows, rows_now)
    changed = [image for image in images if abs(image.change) >= MIN_CHANGE]
    changed.sort(key=lambda image: (-abs(image.change), image.id, image.stage))
    gained, lost = [image for image in changed if image.change > 0], [image for image in changed if image.change < 0]
    return RunComparison(
        stages={stage: (a.get("miou"), b.get("miou")) for stage, (a, b) in pairs.items()},
        classes={stage: dict(_classes(a.get("classes", {}), b.get("classes", {}))) for stage, (a, b) in pairs.items()},
        gained=gained[:LISTED],
        lost=lost[:LISTED],
        counts=(len(gained), len(lost), len(images) - len(changed)),
        unmatched=unmatched,
        note=note,
    )


def _classes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Pair]]:
    for name in [*now, *(name for name in before if name not in now)]:
        yield name, (before.get(name, {}).get("iou"), now.get(name, {}).get("iou"))


def _images(rows: Iterable[audit_rows.Row], rows_now: Iterable[audit_rows.Row]) -> tuple[list[ImageChange], tuple[int, int]]:
    """Changes of the final masks that both have, and the numbers of rows of the revision alone and of current rows alone."""
    old = {(row.id, row.stage): row for row in rows if row.stage in audit_rows.REVIEWED}
    changes, new = [], 0
    for row in rows_now:
        if row.stage not in audit_rows.REVIEWED:
            continue
        before = old.pop((row.id, row.stage), None)
        if before is None:
            new += 1
        elif before.miou is not None and row.miou is not None:
            changes.append(ImageChange(row.id, row.stage, "mIoU", before.miou, row.miou))
        elif before.score is not None and row.score is not None:
            changes.append(ImageChange(row.id, row.stage, "score", before.score, row.score))
    return changes, (len(old), new)


def render(rev: str, comparisons: Mapping[str, RunComparison | None], report: str) -> str:
    """The page as text; report: address of the report's page, which images are linked to."""
    template = templates.environment().get_template(TEMPLATE)
    return template.render(rev=rev, comparisons=comparisons, report=report, style=templates.style(), min_change=MIN_CHANGE)
