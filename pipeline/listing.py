"""Functions that data sets share: ids, splits, image files, and the error that lists all problems of a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from pipeline.core.contracts import Listing
from pipeline.core.problems import counted, listed

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


class DatasetError(ValueError):
    """The raw data are not usable; the text counts the problems and lists the first of them.

    problems  one text per problem
    listings  images that could be listed all the same, so that prepare can also check their pixels
    hint      what to do, the last line of the text
    """

    def __init__(self, problems: Sequence[str], *, listings: Sequence[Listing] = (), hint: str = "") -> None:
        self.problems, self.listings, self.hint = list(problems), list(listings), hint
        lines = [f"{counted(problems)} in the data set:", listed(problems), *([hint] if hint else [])]
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Callable[..., DatasetError], tuple[()]]:  # pickled on its way back from a worker process
        return partial(DatasetError, self.problems, listings=self.listings, hint=self.hint), ()


def id_problem(image_id: str) -> str | None:
    """Why an id cannot be used, or None. Ids are relative POSIX paths without suffix that stay in their folder."""
    if any("\ud800" <= character <= "\udfff" for character in image_id):  # how Python shows undecodable file names
        return f"{image_id!r}: the file name is no valid UTF-8"
    path = PurePosixPath(image_id)
    if not image_id or "\0" in image_id:
        return f"{image_id!r}: an id must not be empty or hold a null character"
    if path.is_absolute() or ".." in path.parts or "\\" in image_id:
        return f"{image_id!r}: an id must be a relative path without `..` or backslashes"
    return None


def without_suffix(name: str) -> str:
    """`a/b.jpg` → `a/b`. Only suffixes of images are removed: `scan.v2` is returned as it is."""
    return name[: -len(PurePosixPath(name).suffix)] if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES else name


def duplicates(values: Iterable[str]) -> list[str]:
    """Values that occur more than once, sorted."""
    seen: set[str] = set()
    return sorted({value for value in values if value in seen or seen.add(value)})


def val_by_hash(image_id: str, share: float) -> str:
    """Split by sha256 of the id alone, so that it does not change when images are added. share: fraction of "val", 0..1."""
    number = int.from_bytes(hashlib.sha256(image_id.encode("utf-8", "surrogatepass")).digest()[:8], "big")
    return "val" if number < share * 2**64 else "train"


def images_under(folder: Path) -> list[Path]:
    """Image files at any depth, relative to folder, sorted; hidden files are skipped (macOS leaves `._a.jpg` behind).

    DatasetError if there is no such folder.
    """
    if not folder.is_dir():
        raise DatasetError([f"folder {folder} is missing"])
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(path.relative_to(folder) for path in paths if not path.name.startswith("."))
