"""Figures of another git revision, through DVC, and those of now → a page of gains and losses by method, class, image."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import metrics_file
from pipeline.report import page
from pipeline.report import rows as audit_rows
from pipeline.stage_order import STAGES

TEMPLATE = "against.html.jinja"
SHOWN = 30  # images that gained most, and as many that lost most
LEAST = 0.005  # of mIoU or score: smaller changes of an image are none


class Reader(Protocol):
    """Text of a file of the revision; FileNotFoundError where it has none."""

    def __call__(self, path: Path) -> str: ...


@dataclass(frozen=True)
class Image:
    """One image at one stage, before and now; what is the figure: miou, or score where one of the two has no truth."""

    id: str
    stage: str
    what: str
    before: float
    now: float

    @property
    def change(self) -> float:
        return self.now - self.before


@dataclass(frozen=True)
class Compared:
    """One method: figures by stage and by (stage, class) as (before, now); its images; how many are in one of the two only.

    note: how the schema of the revision's metrics differs from that of now, in a sentence; "" where it does not.
    """

    stages: Mapping[str, tuple[float | None, float | None]]
    classes: Mapping[str, Mapping[str, tuple[float | None, float | None]]]
    gained: Sequence[Image]
    lost: Sequence[Image]
    counts: tuple[int, int, int]  # images that gained, lost, stayed
    alone: tuple[int, int]  # rows before only, now only
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


def compare(methods: Sequence[str], metrics: Path, audit: Path, read: Reader) -> dict[str, Compared | None]:
    """Method → what changed; None where the revision lacks it. FileNotFoundError if it lacks all of them.

    A revision's metrics may be of an older version: IoU of stages and classes have the same keys in all versions.
    """
    found: dict[str, Compared | None] = {}
    for method, now in page.read_metrics(metrics, methods).items():
        try:
            before = json.loads(read(metrics / f"{method}.json"))
        except FileNotFoundError:
            found[method] = None
            continue
        note = metrics_file.version_difference(before)
        found[method] = _compared(before, now, *_rows(audit / f"{method}.csv", read), note)
    if not any(found.values()):
        raise FileNotFoundError(f"the revision has no metrics of {', '.join(methods)} under {metrics}")
    return found


def _rows(path: Path, read: Reader) -> tuple[Iterable[audit_rows.Row], Iterable[audit_rows.Row]]:
    """Rows before and now; none before where the revision is older than these tables."""
    try:
        text = read(path)
    except FileNotFoundError:
        return [], []
    return audit_rows.parse(io.StringIO(text, newline=""), f"{path} of the revision"), audit_rows.read(path)


def _compared(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    rows: Iterable[audit_rows.Row],
    rows_now: Iterable[audit_rows.Row],
    note: str,
) -> Compared:
    stages = [stage for stage in STAGES if stage in before["stages"] or stage in now["stages"]]
    pairs = {stage: tuple(facts["stages"].get(stage, {}) for facts in (before, now)) for stage in stages}
    images, alone = _images(rows, rows_now)
    moved = [one for one in images if abs(one.change) >= LEAST]
    gained = sorted((one for one in moved if one.change > 0), key=lambda one: (-one.change, one.id, one.stage))
    lost = sorted((one for one in moved if one.change < 0), key=lambda one: (one.change, one.id, one.stage))
    return Compared(
        stages={stage: (a.get("miou"), b.get("miou")) for stage, (a, b) in pairs.items()},
        classes={stage: dict(_classes(a.get("classes", {}), b.get("classes", {}))) for stage, (a, b) in pairs.items()},
        gained=gained[:SHOWN],
        lost=lost[:SHOWN],
        counts=(len(gained), len(lost), len(images) - len(moved)),
        alone=alone,
        note=note,
    )


def _classes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float | None, float | None]]]:
    for name in [*now, *(name for name in before if name not in now)]:
        yield name, (before.get(name, {}).get("iou"), now.get(name, {}).get("iou"))


def _images(rows: Iterable[audit_rows.Row], rows_now: Iterable[audit_rows.Row]) -> tuple[list[Image], tuple[int, int]]:
    """Final masks of images that both have, and how many only one has."""
    old = {(row.id, row.stage): row for row in rows if row.stage in audit_rows.REVIEWED}
    found, new = [], 0
    for row in rows_now:
        if row.stage not in audit_rows.REVIEWED:
            continue
        was = old.pop((row.id, row.stage), None)
        if was is None:
            new += 1
        elif was.miou is not None and row.miou is not None:
            found.append(Image(row.id, row.stage, "IoU", was.miou, row.miou))
        elif was.score is not None and row.score is not None:
            found.append(Image(row.id, row.stage, "score", was.score, row.score))
    return found, (len(old), new)


def render(rev: str, found: Mapping[str, Compared | None], report: str) -> str:
    """The page as text; `report` is the address of the report's page, which images are linked to."""
    environment = Environment(
        loader=FileSystemLoader(page.WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": page.figure, "stage": page.stage_name, "part": lambda text: quote(text, safe="")}
    style = Markup((page.WEB / "page.css").read_text(encoding="utf-8"))
    return environment.get_template(TEMPLATE).render(rev=rev, found=found, report=report, style=style)
