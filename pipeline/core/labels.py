"""Class names → the values that masks hold. 0 is background, i + 1 is names[i], 255 is ignore."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

BACKGROUND = 0
IGNORE = 255
MAX_CLASSES = 254  # masks are uint8, and 0 and 255 are taken


@dataclass(frozen=True)
class LabelSpace:
    """The classes of a data set, in the order of their mask values. ValueError on no, too many or duplicate names.

    Tags and score maps use the class index, from 0; masks hold index + 1.
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise ValueError(f"{len(self.names)} classes: between 1 and {MAX_CLASSES} are allowed (masks are uint8)")
        duplicates = sorted({name for name in self.names if self.names.count(name) > 1})
        if duplicates:
            raise ValueError(f"class names stand twice: {', '.join(duplicates)}")

    def __len__(self) -> int:
        return len(self.names)

    def index(self, name: str) -> int:
        """Class index, from 0. KeyError lists the known names."""
        try:
            return self.names.index(name)
        except ValueError:
            raise KeyError(f"unknown class {name!r}; known are {', '.join(self.names)}") from None

    def unknown(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are no class, in order."""
        return [name for name in names if name not in self.names]
