"""A folder of a data set → the image files in it, what else lies there, and links that hide changes from DVC."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.problems import quantity
from pipeline.listing import IMAGE_SUFFIXES

PICTURES = frozenset({".heic", ".heif", ".avif", ".gif", ".svg", ".psd", ".jp2", ".raw", ".cr2", ".nef", ".dng"})  # not read


@dataclass(frozen=True)
class Content:
    """What lies in a folder.

    images    at any depth, relative to the folder, sorted
    others    ending, lower case with its dot ("" for none) → number of files that are not read
    problems  a text per link that is refused and per folder that cannot be read: images behind them are not listed
    """

    images: tuple[Path, ...]
    others: Mapping[str, int]
    problems: tuple[str, ...]


def content_of(folder: Path, root: Path, leave_out: Collection[Path] = ()) -> Content:
    """Hidden files and folders are skipped (macOS leaves `._a.jpg` behind), and so are the paths of `leave_out`.

    root: dataset.root, which holds the folder; links may not lead out of it.
    """
    images, others = [], Counter[str]()
    problems = links_to(folder, root)

    def unreadable(error: OSError) -> None:
        problems.append(f"folder {error.filename} cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=unreadable):
        inner = {name: Path(place, name) for name in folders if not name.startswith(".")}
        inner = {name: path for name, path in inner.items() if path not in leave_out}
        problems += [problem for path in inner.values() if (problem := link_problem(path, root))]
        folders[:] = sorted(inner)
        for name in files:
            path = Path(place, name)
            if name.startswith(".") or path in leave_out:
                continue
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                others[path.suffix.lower()] += 1
                continue
            if problem := link_problem(path, root):
                problems.append(problem)
            if path.is_file():
                images.append(path.relative_to(folder))
    return Content(tuple(sorted(images)), dict(sorted(others.items())), tuple(sorted(problems)))


def links_to(path: Path, root: Path) -> list[str]:
    """`link_problem` of a path within `root` and of the folders on the way to it, where there is one."""
    way = [path, *path.parents]
    return [problem for step in way[: way.index(root)] if (problem := link_problem(step, root))]


def links_among(paths: Iterable[Path], root: Path) -> list[str]:
    """`links_to` of many files, relative to `root`; a text per link."""
    paths = {root / path for path in paths}
    problems = [problem for path in paths if (problem := link_problem(path, root))]
    folders = {path.parent for path in paths} - {root}
    return sorted({*problems, *(problem for folder in folders for problem in links_to(folder, root))})


def link_problem(path: Path, root: Path) -> str | None:
    """Why a path within `root` must not be the link that it is; None where it is no link, or one to a file inside of `root`.

    DVC hashes what a link to a file shows, but does not walk into links to folders (dvc_objects.fs.local): what changes
    behind them would go unseen.
    """
    if not path.is_symlink():
        return None
    shown, target = path.relative_to(root).as_posix(), path.resolve()
    cure = "put what it shows there itself (`cp -rL` copies what links show)"
    if not target.exists():
        return f"{shown!r} is a link to {path.readlink()}, which does not exist; remove it"
    if path.is_dir():
        return f"{shown!r} is a link to the folder {target}; DVC does not look behind such links for changes: {cure}"
    if not target.is_relative_to(root.resolve()):
        return f"{shown!r} is a link that leads out of {root}, to {target}: {cure}"
    return None


def passed_over(others: Mapping[str, int], where: str) -> str | None:
    """A text that counts the files that are not read, by ending; None where there are none. where: the folder's name."""
    if not others:
        return None
    endings = ", ".join(f"{number:,} {ending or 'without ending'}" for ending, number in others.items())
    text = f"{endings} in {where} passed over; read are {', '.join(sorted(IMAGE_SUFFIXES))}"
    pictures = [ending for ending in others if ending in PICTURES]
    if not pictures:
        return text
    files = quantity(sum(others[ending] for ending in pictures), "picture")
    return f"{text}. Convert {files} with ImageMagick: `mogrify -format jpg *{pictures[0]}` in each folder" + (
        "; or `heif-convert a.heic a.jpg` (Debian: libheif-examples)" if ".heic" in pictures else ""
    )
