"""A tar shard in WebDataset's layout → its samples: files side by side that are called alike up to the first point."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # bytes; a tar file is made of these
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}  # by first bytes


@dataclass(frozen=True)
class Member:
    """A file in a shard. offset: bytes before its content, length: of its content."""

    name: str
    offset: int
    length: int


@dataclass(frozen=True)
class Sample:
    """key: name up to the first point of its last part; members: rest of the name, lower case → file."""

    key: str
    members: Mapping[str, Member]


def samples_of(path: Path, problems: list[str]) -> Iterator[Sample]:
    """Samples in the order of the file; what cannot be used is left out, and a text added to `problems`.

    Hidden files are skipped (macOS leaves `._a.jpg` behind), and WebDataset's own `__meta__`.
    """
    key, members, seen = "", dict[str, Member](), set[str]()
    for member in _members(path, problems):
        folder, slash, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if not stem or (stem.startswith("__") and stem.endswith("__")):
            continue
        if folder + slash + stem != key:
            if members:
                yield Sample(key, members)
            key, members = folder + slash + stem, {}
            if key in seen:
                problems.append(f"{path.name}: {key!r} comes twice; files of a sample must follow each other")
            seen.add(key)
        if ending.lower() in members:
            problems.append(f"{path.name}: {member.name!r} comes twice")
        members[ending.lower()] = member
    if members:
        yield Sample(key, members)


def _members(path: Path, problems: list[str]) -> Iterator[Member]:
    """Files whose content lies in one piece and whole in the shard."""
    first = path.open("rb").read(6)
    packed = next((name for start, name in PACKED.items() if first.startswith(start)), None)
    if packed:
        problems.append(f"{path.name} is compressed ({packed}); images are read in place: unpack it to a plain tar file")
        return
    try:
        with tarfile.open(path, "r:") as tar:
            while (entry := tar.next()) is not None:
                if entry.isfile() and not entry.issparse():
                    yield Member(entry.name, entry.offset_data, entry.size)
                elif not entry.isdir():
                    kind = "a sparse file" if entry.issparse() else "no file but a link or device"
                    problems.append(f"{path.name}: {entry.name!r} is {kind}; pack it again as a plain file")
            end = tar.offset
        with path.open("rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            if file.read(BLOCK).strip(b"\0"):
                problems.append(f"{path.name} is damaged at byte {end:,}: what follows is lost; pack or copy it again")
    except (tarfile.TarError, OSError, ValueError, OverflowError, EOFError) as error:
        problems.append(f"{path.name} is damaged or no tar file ({error}); pack or copy it again")
