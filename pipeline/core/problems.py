"""Problems of an input → the text of one error: how many there are, and the first of them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20  # problems that one error spells out


def listed(problems: Sequence[str], separator: str = "\n") -> str:
    """The first SHOWN problems and, where there are more, "… and n more", joined by `separator`."""
    rest = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return separator.join([*problems[:SHOWN], *rest])


def counted(problems: Sequence[str]) -> str:
    """Their number in words: 1 problem, 2 problems, …"""
    return f"{len(problems)} {'problem' if len(problems) == 1 else 'problems'}"
