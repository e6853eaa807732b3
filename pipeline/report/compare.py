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
    note       what of the revision's figures is of another version, or is not there, in a sentence; "" where nothing is
    data       how the data that the revision was evaluated on differ, in words: no figure is comparable then; "" where they
               do not
    """

    stages: Mapping[str, Pair]
    classes: Mapping[str, Mapping[str, Pair]]
    gained: Sequence[ImageChange]
    lost: Sequence[ImageChange]
    counts: tuple[int, int, int]
    unmatched: tuple[int, int]
    note: str
    data: str


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
    """Run → its comparison; None where the revision lacks it. Runs that are not evaluated now are left out.

    A revision's figures may be of an older version: IoU of stages and classes have the same keys in all versions.
    FileNotFoundError if the revision lacks all runs, or none is evaluated now.
    """
    evaluated = [method for method in methods if (audit / f"{method}.json").is_file()]
    if not evaluated:
        raise FileNotFoundError(f"{audit} has figures of no run; run `dvc repro`")
    comparisons: dict[str, RunComparison | None] = {}
    for method, now in run_metrics.read(audit, evaluated).items():
        try:
            before, note = _figures_before(method, metrics, audit, read)
        except FileNotFoundError:
            comparisons[method] = None
            continue
        comparisons[method] = _comparison(before, now, *_rows(audit / f"{method}.csv", read), note)
    if not any(comparisons.values()):
        raise FileNotFoundError(f"the revision has no metrics of {', '.join(evaluated)} under {metrics}")
    return comparisons


def _figures_before(method: str, metrics: Path, audit: Path, read: Reader) -> tuple[dict[str, Any], str]:
    """All figures of the revision, and what is to be said of them. FileNotFoundError where it has no metrics of the run."""
    path = audit / f"{method}.json"
    try:
        figures = json.loads(read(path))
    except FileNotFoundError:
        path = metrics / path.name
        figures = json.loads(read(path))
    if "stages" not in figures:  # a headline, of version 3 on
        stages = {stage: {"miou": miou} for stage, miou in metrics_file.mious(figures).items()}
        note = f"audit/{method}.json is not in the revision: only the mIoU of its stages is compared"
        return {"stages": stages}, note
    difference = metrics_file.version_difference(figures)
    note = f"{path} of the revision {difference}; only figures that are in both versions are compared" if difference else ""
    return figures, note


def data_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Figures of a run at two times → how the data differ that they are of, in words; "" where nothing says that they do.

    Figures before version 3 have no digests: there, numbers of images and names of classes are compared.
    """
    differences = []
    data, data_now = before.get("data"), now.get("data")
    classes, classes_now = (_class_names(figures) for figures in (before, now))
    if data and data_now:
        if data["classes"] != data_now["classes"]:
            differences.append("classes")
        if data["ids"] != data_now["ids"]:
            differences.append("images")
        if not differences and data["records"] != data_now["records"]:
            differences.append("tags, splits, sizes or contents of images")
    else:
        if classes and classes_now and classes != classes_now:
            differences.append("classes")
        if before.get("images", now.get("images")) != now.get("images"):
            differences.append("numbers of images")
    if not differences:
        return ""
    return " and ".join(differences) + " differ" + _listed(classes, classes_now) + _counts(before, now)


def _class_names(figures: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for stage in figures["stages"].values() for name in stage.get("classes", {})))


def _listed(classes: Sequence[str], classes_now: Sequence[str]) -> str:
    """Names of classes that only one of the two has."""
    sides = (("in the revision alone", classes, classes_now), ("new", classes_now, classes))
    texts = []
    for words, names, others in sides:
        names = [name for name in names if name not in others]
        if names and others:
            texts.append(f"{words}: {', '.join(names[:LISTED])}")
    return f" ({'; '.join(texts)})" if texts else ""


def _counts(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Numbers of images of both, where they differ."""
    if "images" not in before or "images" not in now or before["images"] == now["images"]:
        return ""
    texts = [f"{figures['images']['train']} train and {figures['images']['val']} val" for figures in (before, now)]
    return f"; images: {texts[0]} in the revision, {texts[1]} now"


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
        data=data_difference(before, now),
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
