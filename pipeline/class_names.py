"""Names of classes: which are refused, and which are likely misspelt."""

from __future__ import annotations

import difflib
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from pipeline.core.labels import MAX_CLASSES
from pipeline.core.problems import listed, quantity

LONGEST = 100  # characters of a name
BACKGROUND_NAMES = frozenset({"background", "_background_", "__background__"})
IGNORE_NAMES = frozenset({"ignore", "__ignore__", "void", "unlabeled", "unlabelled"})
NOT_PLAIN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # Unicode categories: control characters, halves of pairs, line ends
ALIKE = 0.8  # difflib's ratio from which two names are alike: person and preson are
NAMED = 10  # names that a text spells out
RARE = 0.1  # a name on fewer images than this fraction of the other's is likely its misspelling


def problems(names: Sequence[str]) -> list[str]:
    """A text per name that cannot be the name of a class, and one if there are too many of them."""
    texts = [f"class {shortened(name)}: {problem}" for name in dict.fromkeys(names) for problem in _problems_of(name)]
    texts += [f"class {shortened(name)} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(set(names)) > MAX_CLASSES:
        texts.append(f"{len(set(names))} classes: at most {MAX_CLASSES} are allowed, since masks have one byte a pixel")
    return texts


def _problems_of(name: str) -> list[str]:
    if name.casefold() in BACKGROUND_NAMES:
        return [
            "the name is reserved. Masks hold 0 for background by themselves; as a class of its own it would shift the "
            "value of every class after it by one. Remove it; an image that shows no class has an empty tags cell"
        ]
    if name.casefold() in IGNORE_NAMES:
        return ["the name is reserved. Masks hold 255 for pixels that do not count, without a class of that name. Remove it"]
    texts = []
    if not name.strip():
        texts.append("the name is empty")
    if len(name) > LONGEST:
        texts.append(f"the name has {len(name)} characters, allowed are {LONGEST}; is the separator between tags missing?")
    if any(unicodedata.category(character) in NOT_PLAIN for character in name):
        texts.append("the name holds a control character or a line end")
    if "/" in name or "\\" in name or name in (".", ".."):
        texts.append("the name must not hold / or \\, nor be `.` or `..`: files are named after classes")
    return texts


def shortened(name: str) -> str:
    """The name in quotation marks, control characters escaped, cut where it is long."""
    return repr(name if len(name) <= 60 else name[:57] + "…")


def nearest(name: str, names: Collection[str]) -> str | None:
    """The one of `names` that is most like `name`, in any case of letters; None where none is alike."""
    folded = {other.casefold(): other for other in sorted(names, reverse=True) if other != name}
    if name.casefold() in folded:
        return folded[name.casefold()]
    matches = difflib.get_close_matches(name.casefold(), sorted(folded), 1, ALIKE)
    return folded[matches[0]] if matches else None


def warnings(images: Mapping[str, int]) -> list[str]:
    """A text per class that is likely another class written differently. images: class → number of images with the tag.

    Names that differ in case alone are always named, others that are alike where one is rare: on one image, or on fewer than
    RARE of the images of the other; and names that are made of other names (`cat dog`), where a separator is likely missing.
    """
    composed = _composed_of_others(images)
    texts = []
    if composed:
        texts.append(
            f"{quantity(len(composed), 'class is', 'classes are')} made of names of others: "
            f"{listed([*map(repr, composed)], ', ', NAMED)}; part tags in one way, by `;` or by spaces"
        )
    by_images = sorted(set(images) - set(composed), key=lambda name: (images[name], name))
    for place, name in enumerate(by_images):
        other = nearest(name, by_images[place + 1 :])
        if other is not None and (name.casefold() == other.casefold() or images[name] <= max(1, RARE * images[other])):
            pair = (f"{name!r} ({quantity(images[name], 'image')})", f"{other!r} ({images[other]:,})")
            texts.append(f"class {pair[0]} stands beside {pair[1]}: is it the same, written differently?")
    return texts


def _composed_of_others(names: Collection[str]) -> list[str]:
    """Names of several words that are classes, or stand in several such names, at least one of them a class: of `cow; dog;
    cow person; dog person` the last two, but not `hot dog` beside `dog`."""
    words = {name: name.split() for name in names if len(name.split()) > 1}
    number = Counter(word for of_name in words.values() for word in set(of_name))
    return sorted(
        name
        for name, of_name in words.items()
        if any(word in names for word in of_name) and all(word in names or number[word] > 1 for word in of_name)
    )
