"""Values in masks and tags of the same images → how far they agree, and which order of the classes would fit better.

It says something about the data, and chooses nothing: the tags stay as they are, and no later stage learns of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.core.labels import BACKGROUND, IGNORE
from pipeline.core.problems import listed, quantity

TOO_LITTLE = 0.5  # agreement under which something is said
BETTER = 0.2  # by how much another order must agree better to be named


@dataclass(frozen=True)
class Fit:
    """Agreement 0..1 of masks and tags where value v is class order[v - 1], -1 for none.

    shift: by how much every value is too high; None where the order is no shift.
    """

    agreement: float
    order: tuple[int, ...]
    shift: int | None


class MaskAgreement:
    """Counts, over images that have both a mask and tags, how often value v and class t are seen together.

    Agreement is the number of pairs (image, class) that mask and tags both have, out of those that one of them has.
    """

    def __init__(self, classes: int) -> None:
        self._both = np.zeros((IGNORE, classes), np.int64)  # [v, t]
        self._values = np.zeros(IGNORE, np.int64)
        self._tags = np.zeros(classes, np.int64)
        self.images = 0

    def add(self, values: np.ndarray, tags: Sequence[int]) -> None:
        """Of one image. values: u8[k] in its mask, each once; tags: class indices from 0."""
        inside = values[(values != BACKGROUND) & (values != IGNORE)]
        self._both[np.ix_(inside, np.asarray(tags, np.int64))] += 1
        self._values[inside] += 1
        self._tags[list(tags)] += 1
        self.images += 1

    def pairs(self) -> int:
        """(Image, class) that mask or tags have, the values taken as they are."""
        return int(self._values.sum() + self._tags.sum()) - self._shared(self._shifted(0))

    def agreement(self) -> float:
        """0..1; 1 where there is nothing to compare."""
        return self._agreement(self._shifted(0))

    def _shifted(self, shift: int) -> tuple[int, ...]:
        """Value v is class v - 1 - shift, -1 where there is no such class."""
        classes = len(self._tags)
        return tuple(index if 0 <= (index := place - shift) < classes else -1 for place in range(IGNORE - 1))

    def _shared(self, order: Sequence[int]) -> int:
        return int(sum(self._both[place + 1, index] for place, index in enumerate(order) if index >= 0))

    def _agreement(self, order: Sequence[int]) -> float:
        shared = self._shared(order)
        union = int(self._values.sum() + self._tags.sum()) - shared
        return shared / union if union else 1.0

    def best(self) -> Fit:
        """The shift or, where that agrees clearly less, the assignment of values to classes that agrees most."""
        shifts = {shift: self._agreement(self._shifted(shift)) for shift in (1, -1, 2, -2)}
        shift = max(shifts, key=lambda candidate: shifts[candidate])
        order = np.full(IGNORE - 1, -1)
        rows, columns = linear_sum_assignment(self._both[1:], maximize=True)
        seen = self._both[1:][rows, columns] > 0
        order[rows[seen]] = columns[seen]
        assigned = self._agreement(order.tolist())
        if shifts[shift] >= 0.95 * assigned:
            return Fit(shifts[shift], self._shifted(shift), shift)
        return Fit(assigned, tuple(order.tolist()), None)

    def warnings(self, names: Sequence[str]) -> list[str]:
        """A text where masks and tags agree in fewer than half of the pairs; else []. names: the classes, in order."""
        agreement = self.agreement()
        if agreement >= TOO_LITTLE:
            return []
        text = (
            f"masks and tags of the same images agree in {agreement:.0%} of {quantity(self.pairs(), 'pair')} of image and "
            f"class ({quantity(self.images, 'image')}), so figures will be far too low"
        )
        fit = self.best()
        if fit.agreement < agreement + BETTER:
            return [f"{text}; no other order of the classes fits better: are these the masks of these images?"]
        return [f"{text}; they would agree in {fit.agreement:.0%} if {_cure(fit, names)}"]


def _cure(fit: Fit, names: Sequence[str]) -> str:
    if fit.shift is not None:
        number = quantity(abs(fit.shift), "value")
        why = " (as if the list of classes began with background)" if fit.shift == 1 else ""
        if fit.shift > 0:
            return f"every value but 0 and 255 were {number} lower{why}: subtract {fit.shift} from the masks' values"
        return f"every value but 0 and 255 were {number} higher: add {-fit.shift} to the masks' values (0 is background)"
    meanings = listed([f"{value} {names[index]!r}" for value, index in enumerate(fit.order, 1) if index >= 0], ", ")
    values = [value for value, index in enumerate(fit.order, 1) if index >= 0]
    if max(values) > len(names):
        return f"values meant: {meanings}; `classes` of dataset.options must name each value of the masks, in their order"
    rest = [name for index, name in enumerate(names) if index not in fit.order]
    order = [names[index] if index >= 0 else rest.pop(0) for index in fit.order[: len(names)]]
    return f"values meant: {meanings}; set `classes: [{', '.join(order)}]` in dataset.options, or change the masks"
