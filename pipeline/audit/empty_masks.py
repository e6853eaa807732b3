"""Tags and mask values → whether most tagged classes have no pixel, as of a method that has learned nothing. No truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

ADVICE = (
    "what to do: see in plots/<run>/train.csv whether the loss fell; if not, give training more steps "
    "(train.schedule.min_steps in the recipe) or more photographs; if it did, lower the threshold (fit_refiner.threshold). "
    "docs/how-many-photographs.md has figures"
)


def counts(tags: Iterable[int], present: np.ndarray, classes: int) -> np.ndarray:
    """Of one image: i64[classes, 2], 1 for each class that is tagged, and 1 for those of them without a pixel.

    tags     classes from 0
    present  [256] or so, indexed by mask value; not 0 where the mask has it
    classes  of the data set, without background
    """
    table = np.zeros((classes, 2), np.int64)
    for tag in tags:
        table[tag] = (1, int(not present[tag + 1]))
    return table


def finding(table: np.ndarray, names: Sequence[str], stage: str) -> dict[str, Any] | None:
    """Sums of `counts` over images, i64[classes, 2] → what metrics and report say; None where all is well.

    It is not where more than half of the tagged classes have no pixel in any image, or more than half of the tags have none.
    names: of the classes; stage: whose masks they are.
    """
    tagged = np.flatnonzero(table[:, 0]).tolist()
    without = [names[index] for index in tagged if table[index, 0] == table[index, 1]]
    tags, tags_without = (int(value) for value in table.sum(axis=0))
    if 2 * len(without) <= len(tagged) and 2 * tags_without <= tags:
        return None
    if 2 * len(without) > len(tagged):
        message = f"{len(without)} of {len(tagged)} tagged classes have no pixel in any mask: {', '.join(without)}"
    else:
        message = f"{tags_without} of {tags} tags have no pixel in their image's mask"
    return {
        "stage": stage, "classes": len(tagged), "without_pixels": without, "tags": tags, "tags_without_pixels": tags_without,
        "message": message, "advice": ADVICE,
    }  # fmt: skip


def warning(run: str, found: dict[str, Any]) -> str:
    """One line of it for the terminal."""
    return f"{found['stage'].replace('_', '-')} of {run}: {found['message']}; {found['advice'].replace('<run>', run)}"
