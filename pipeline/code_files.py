"""The files of tag2mask itself, wherever they are installed → digests by which DVC sees that one has changed.

In a clone, dvc.yaml lists code by its paths, and DVC hashes it. A project folder made by `tag2mask init` holds no code:
there, stage `code` writes CODE_FILE, and stages depend on entries of it as they do on params. Names neither stages nor
methods: dvc.yaml does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of a clone, or package `tag2mask` of an installation
CODE_FILE = "code.yaml"  # of a project folder
FOLDERS = ("pipeline/", "stages/")


def is_code(dep: str) -> bool:
    """Whether a dep of the DAG is code of tag2mask."""
    return dep.startswith(FOLDERS)


def entry_of(path: str) -> str:
    """A code path's key in CODE_FILE: without `.py`, since DVC takes a point in a key for a level of nesting."""
    return path.removesuffix(".py")


def covers(entry: str, file: str) -> bool:
    """Whether an entry of CODE_FILE stands for a file: its own, or that of a folder that it lies in."""
    return file == f"{entry}.py" or file.startswith(f"{entry}/")


def digests(paths: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Entry → digest of the code below each path, sorted. A part `${…}` of a path stands for every name."""
    found: dict[str, str] = {}
    for path in paths:
        pattern = "/".join("*" if "${" in part else part for part in path.split("/"))
        for match in root.glob(pattern):
            if not match.name.startswith("__"):
                found[entry_of(match.relative_to(root).as_posix())] = _digest(match)
    return dict(sorted(found.items()))


def changed(recorded: Mapping[str, str], entries: Iterable[str], root: Path = ROOT) -> list[str]:
    """Those of the entries whose code is not what was recorded."""
    return [entry for entry in entries if digests([entry, f"{entry}.py"], root).get(entry) != recorded.get(entry)]


def _digest(path: Path) -> str:
    """Half a sha256 of a file, or of all files of a folder with their names; caches of Python do not count."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path.parent).as_posix()}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:32]
