"""Files of segments from outside, as SAM's automatic mask generator writes them → the segments of an image.

`index` reads such a file once and keeps where each image's segments lie in it, with their sha256; `read` then reads one
image's at a time. So memory does not grow with the file, no image id becomes a path that was not listed, and a file that has
changed since is an error, never a stale result in the cache. docs/refiners.md has the layouts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.core.problems import counted, listed

SUFFIX = ".json"
MOST_CHARACTERS = 7  # of one compressed run length: 35 bits, and COCO's are 32
MOST_PIXELS = 2**16  # along a side
FILE_HINT = (
    "each image needs a list of {segmentation: {size: [h, w], counts: COCO RLE}}: in a folder as <id>.json, or in one file "
    'as a line {"id": …, "annotations": […]} (docs/refiners.md)'
)


@dataclass(frozen=True)
class SegmentFile:
    """Segments from outside.

    path    a folder of <id>.json, or a JSON Lines file
    sha256  of that file, or of a folder's listing
    """

    source: Literal["file"]
    path: str
    sha256: str


class Segments(NamedTuple):
    """The s segments of one image that have at least one pixel.

    runs    i64[·] per segment: lengths of runs of pixels, column by column, alternately outside and inside (COCO RLE)
    levels  i64[s]; where segments overlap, the higher level is painted later
    size    (h, w) px, None where the image has no segment
    """

    runs: list[np.ndarray]
    levels: np.ndarray
    size: tuple[int, int] | None


class Place(NamedTuple):
    """Where one image's JSON lies in its file. offset and length in bytes; sha256 of those bytes."""

    offset: int
    length: int
    sha256: bytes


class Entry(NamedTuple):
    """One image of a file of segments. size: (h, w) px, None where it has no segment; problem: why they cannot be read, or
    None."""

    place: Place
    size: tuple[int, int] | None
    problem: str | None


class Piece(NamedTuple):
    """The JSON of one image, undecoded. image_id: None where only the JSON itself holds it; name: for errors."""

    image_id: str | None
    name: str
    offset: int
    data: bytes


def run_lengths(counts: Any, pixels: int) -> np.ndarray:
    """COCO's `counts`, compressed (text) or not (a list) → i64[·] run lengths, outside first, that sum to `pixels`.
    ValueError.

    Compressed: a character less 48 holds 5 bits of a signed number, lowest first, then whether more follow; from the fourth
    number on, each is the difference to the last but one.
    """
    if isinstance(counts, str):
        codes = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
        ends = np.flatnonzero((codes & 32) == 0)
        if ((codes < 0) | (codes > 63)).any() or not len(ends) or ends[-1] != len(codes) - 1:
            raise ValueError("counts is no compressed COCO RLE")
        starts = np.concatenate([[0], ends[:-1] + 1])
        if (ends - starts).max() >= MOST_CHARACTERS:
            raise ValueError("counts is no compressed COCO RLE: a run is too long")
        shift = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
        lengths = np.add.reduceat((codes & 31) << shift, starts)
        lengths -= np.where(codes[ends] & 16, np.int64(1) << (shift[ends] + 5), 0)
        lengths[1::2] = np.cumsum(lengths[1::2])
        lengths[2::2] = np.cumsum(lengths[2::2])
    elif isinstance(counts, list) and counts and all(type(count) is int and 0 <= count <= pixels for count in counts):
        lengths = np.array(counts, np.int64)
    else:
        raise ValueError("counts is neither a text (compressed RLE) nor a list of whole numbers from 0 to h × w")
    if (lengths < 0).any() or lengths.sum() != pixels:
        raise ValueError(f"its runs do not fill the {pixels} pixels of `size`")
    return lengths


def _segment_of(annotation: Any) -> tuple[tuple[int, int], np.ndarray, int]:
    """One annotation → (h, w) px, run lengths i64[·] and level. KeyError, TypeError, AttributeError or ValueError."""
    (h, w), counts = annotation["segmentation"]["size"], annotation["segmentation"]["counts"]
    level = annotation.get("level", 0)
    if type(h) is not int or type(w) is not int or not (0 < h < MOST_PIXELS and 0 < w < MOST_PIXELS):
        raise ValueError(f"size is {[h, w]}, not [h, w] in px")
    if type(level) is not int or abs(level) >= 2**31:
        raise ValueError(f"level is {level!r}, not a whole number")
    return (h, w), run_lengths(counts, h * w), level


def segments_of(content: Any) -> Segments:
    """One image's JSON, a list of segments or a mapping with `annotations` → its segments. ValueError says what is wrong."""
    annotations = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(annotations, list):
        raise ValueError("no list of segments")
    sizes, runs, levels = set[tuple[int, int]](), [], []
    for number, annotation in enumerate(annotations):
        try:
            size, lengths, level = _segment_of(annotation)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"segment {number} is no mapping with segmentation: {{size: [h, w], counts: …}}") from None
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from None
        sizes.add(size)
        if lengths[1::2].any():  # a segment without a pixel has no mean score
            runs.append(lengths)
            levels.append(level)
    if len(sizes) > 1:
        raise ValueError(f"its segments differ in size: {sorted(sizes)}")
    return Segments(runs, np.array(levels, np.int64), next(iter(sizes), None))


def _json_files(folder: Path) -> list[str]:
    """Names of the JSON files at any depth, relative to folder, sorted; hidden ones (systems leave some) are passed over."""
    files = (path for path in folder.rglob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _pieces(path: Path, digest: Any) -> Iterator[Piece]:
    """Each image of a folder or of a JSON Lines file.

    digest: a hashlib object, updated by all that is read: the bytes of a file; of a folder what `sha256sum` prints of its
    files, sorted by name.
    """
    if path.is_dir():
        for name in _json_files(path):
            data = (path / name).read_bytes()
            digest.update(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode("utf-8", "surrogateescape"))
            yield Piece(name.removesuffix(SUFFIX), name, 0, data)
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                yield Piece(None, f"line {number}", offset, line)
            offset += len(line)


def _checked_path(file: SegmentFile) -> Path:
    """ValueError if it is not there."""
    path = Path(file.path)
    if not path.is_dir() and not path.is_file():
        raise ValueError(
            f"fit_refiner.segments.path: there is no file or folder {path}; {FILE_HINT}, or choose another source "
            "(edit the recipe)"
        )
    return path


def _check_digest(file: SegmentFile, digest: Any) -> None:
    """ValueError that names the digest to write down, unless it is the expected one."""
    actual = digest.hexdigest()
    if actual != file.sha256:
        raise ValueError(
            f"fit_refiner.segments.sha256: the recipe has {file.sha256!r}, but {file.path} has {actual}; if that is "
            f"the file "
            "you mean, write this digest there, so that results follow the file (edit the recipe)"
        )


def check(file: SegmentFile) -> None:
    """ValueError unless the file is there and has the sha256 of its settings."""
    digest = hashlib.sha256()
    for _ in _pieces(_checked_path(file), digest):
        pass
    _check_digest(file, digest)


def index(file: SegmentFile) -> tuple[dict[str, Entry], list[str]]:
    """One pass over the file → its images by id, and what is wrong with pieces that belong to no image.

    ValueError where the file is missing or has another sha256 than its settings say.
    """
    digest, entries, problems = hashlib.sha256(), dict[str, Entry](), list[str]()
    for image_id, name, offset, data in _pieces(_checked_path(file), digest):
        size = problem = None
        try:
            content = json.loads(data)
            if image_id is None and isinstance(content, dict):
                image_id = content.get("id")
            size = segments_of(content).size
        except (ValueError, RecursionError) as error:
            undecodable = isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError))
            problem = f"{name}: {'no JSON, ' if undecodable else ''}{error}"
        if not isinstance(image_id, str):
            problems.append(problem or f"{name}: `id` must be a text, got {image_id!r}")
        elif image_id in entries:
            problems.append(f"{name}: {image_id!r} was there before")
        else:
            entries[image_id] = Entry(Place(offset, len(data), hashlib.sha256(data).digest()), size, problem)
    _check_digest(file, digest)
    return entries, problems


def require(
    file: SegmentFile, entries: Mapping[str, Entry], sizes: Mapping[str, tuple[int, int]], problems: Sequence[str]
) -> None:
    """ValueError that lists all that is wrong with a file, if anything is.

    sizes: (h, w) px by id of the images that need segments; problems: of pieces that belong to no image.
    """
    mismatches = (_mismatch(image_id, size, entries.get(image_id)) for image_id, size in sizes.items())
    problems = [*problems, *(text for text in mismatches if text)]
    if not problems:
        return
    missing = any(image_id not in entries for image_id in sizes)  # then other ids show how the file names images
    others = [image_id for image_id in entries if image_id not in sizes] if missing else []
    lines = [f"{file.path}: {counted(problems)} with its segments:", listed(problems)]
    lines += [f"it has {', '.join(map(repr, others[:5]))}, which no training image with a tag is called"] if others else []
    raise ValueError("\n".join([*lines, FILE_HINT]))


def _mismatch(image_id: str, size: tuple[int, int], entry: Entry | None) -> str | None:
    """What is wrong with an image's segments, or None."""
    if entry is None:
        return f"{image_id!r}: it has no segments of this image"
    if entry.problem:
        return f"{image_id!r}: {entry.problem}"
    if entry.size is not None and entry.size != size:
        (h, w), (rows, columns) = entry.size, size
        return f"{image_id!r}: segments of {h} × {w} px, but the image has {rows} × {columns} (h × w)"
    return None


def as_state(places: Mapping[str, Place]) -> dict[str, np.ndarray]:
    """Places by image id as arrays, sorted by id: `ids` u8[·] UTF-8, separated by null characters; `place` i64[n,2] offset
    and length in bytes; `sha256` u8[n,32]."""
    ids = sorted(places)
    return {
        "ids": np.frombuffer("\0".join(ids).encode("utf-8"), np.uint8),
        "place": np.array([places[image_id][:2] for image_id in ids], np.int64).reshape(-1, 2),
        "sha256": np.frombuffer(b"".join(places[image_id].sha256 for image_id in ids), np.uint8).reshape(-1, 32),
    }


def from_state(state: Mapping[str, np.ndarray]) -> dict[str, Place]:
    """The inverse of `as_state`."""
    ids = [image_id for image_id in state["ids"].tobytes().decode("utf-8").split("\0") if image_id]
    rows = zip(ids, state["place"].tolist(), state["sha256"], strict=True)
    return {image_id: Place(offset, length, sha256.tobytes()) for image_id, (offset, length), sha256 in rows}


def read(file: SegmentFile, image_id: str, place: Place) -> Segments:
    """One image's segments. ValueError if they have changed since they were indexed."""
    path = Path(file.path)
    if path.is_dir():  # the id is the name of a file that `index` listed in there
        path = path / (image_id + SUFFIX)
    with path.open("rb") as opened:
        opened.seek(place.offset)
        data = opened.read(place.length)
    if hashlib.sha256(data).digest() != place.sha256:
        raise ValueError(
            f"{path}: the segments of {image_id!r} have changed since fit_refiner read them; give the new sha256"
        )
    return segments_of(json.loads(data))
