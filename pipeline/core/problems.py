"""Numbers of things in words, and problems of an input → the text of one error: how many there are, the first of them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20  # problems that one error spells out


def listed(problems: Sequence[str], separator: str = "\n", shown: int = SHOWN) -> str:
    """The first `shown` of them and, where there are more, "… and n more", joined by `separator`."""
    rest = [f"… and {len(problems) - shown} more"] if len(problems) > shown else []
    return separator.join([*problems[:shown], *rest])


def counted(problems: Sequence[str]) -> str:
    """Their number in words: 1 problem, 2 problems, …"""
    return quantity(len(problems), "problem")


def quantity(number: int, singular: str, plural: str | None = None) -> str:
    """1 image, 2 images, 1,200 images. plural: of words that take more than an s."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
