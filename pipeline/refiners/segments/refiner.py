"""Class-agnostic segments, each given one label by the score maps inside it (SAM-based seeding of FMA-WSSS, which SemPLeS takes).

Segments are superpixels, or masks that the user brings in a file, as SAM's automatic mask generator writes them; docs/refiners.md
has the layouts. `fit` reads such a file once, checks it against all training images, and keeps where each image's masks stand in
it and their sha256; `Refiner` reads one image's masks at a time. So memory does not grow with the file, no id ever becomes
a path that was not listed, and a file that has changed since is an error, never a stale result in the cache.

Letters: s segments, k classes present in the image, h w its pixels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from pipeline.core import config
from pipeline.core.config import AboveZero, NonNegative, Positive
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes, threshold
from pipeline.imaging.threshold import Background

__all__ = ["FitParams", "Params", "Refiner", "check", "fit"]

SHOWN = 20  # problems that one error spells out
SUFFIX = ".json"
EPS = 1e-7  # FMA-WSSS adds it to a class's spread, so that of the best segments of two classes that with more contrast is surer
LEAST_SPREAD = 1e-6  # of a class's means over an image's segments, for min-max to say anything
MOST_CHARACTERS = 7  # of one compressed run length: 35 bits, and COCO's are 32
MOST_PIXELS = 2**16  # along a side
ABSENT = -1  # in place of a segment's number: the pixel lies in none
FILE_HINT = (
    "each image needs a list of {segmentation: {size: [h, w], counts: COCO RLE}}: in a folder as <id>.json, or in one file "
    'as a line {"id": …, "annotations": […]} (docs/refiners.md)'
)


@dataclass(frozen=True)
class SegmentFile:
    """Segments from outside. path: a folder of <id>.json, or a JSON Lines file; sha256: of that file, or of a folder's listing."""

    source: Literal["file"]
    path: str
    sha256: str


@dataclass(frozen=True)
class Felzenszwalb:
    """Superpixels of Felzenszwalb and Huttenlocher (2004): scale, higher for larger ones; sigma px of smoothing before; min_size px."""

    source: Literal["felzenszwalb"]
    scale: AboveZero
    sigma: NonNegative
    min_size: Positive


@dataclass(frozen=True)
class Slic:
    """Superpixels of SLIC (Achanta et al. 2012): about so many an image; compactness, higher for squarer ones; sigma px of smoothing."""

    source: Literal["slic"]
    n_segments: Positive
    compactness: AboveZero
    sigma: NonNegative


@dataclass(frozen=True)
class FitParams:
    """fit_refiner.<m>: the background level of the score maps, and where segments come from."""

    background: Background
    segments: Annotated[SegmentFile | Felzenszwalb | Slic, Field(discriminator="source")]


@dataclass(frozen=True)
class Params:
    """refine.<m>.options.

    normalise  minmax: each class's mean scores go from 0 to 1 over the image's segments (FMA-WSSS); none: means as they are
    power      background's score is (1 - best class)^power. A number is the power at the fitted level (FMA-WSSS: 0.6 to 1.0 on VOC
               and COCO). null: the power at which a segment whose best class has just the level ties with background
    uncovered  pixels in no segment: background (FMA-WSSS), or what the score maps say there against the level
    """

    normalise: Literal["minmax", "none"]
    power: AboveZero | None
    uncovered: Literal["background", "scores"]


class Entry(NamedTuple):
    """Where one image's segments stand. size: (h, w) px, None where there is no segment; problem: what is wrong with them."""

    offset: int
    length: int
    sha256: bytes
    size: tuple[int, int] | None
    problem: str | None


class Segments(NamedTuple):
    """One image's segments. runs: i64[·] each, lengths of runs of pixels down the columns, outside and inside by turns (COCO RLE);
    levels: i64[s], higher for what is painted later; size: (h, w) px, None where there is no segment."""

    runs: list[np.ndarray]
    levels: np.ndarray
    size: tuple[int, int] | None


# ---- reading ----------------------------------------------------------------------------------------------------------------


def run_lengths(counts: Any, pixels: int) -> np.ndarray:
    """COCO's `counts`, compressed (text) or not (a list) → i64[·] run lengths, outside first, that sum to `pixels`. ValueError.

    Compressed: a character less 48 holds 5 bits of a signed number, lowest first, then whether more follow; from the fourth number
    on, each is the difference to the last but one.
    """
    if isinstance(counts, str):
        codes = np.frombuffer(counts.encode("utf-8"), np.uint8).astype(np.int64) - 48
        ends = np.flatnonzero((codes & 32) == 0)
        if ((codes < 0) | (codes > 63)).any() or not len(ends) or ends[-1] != len(codes) - 1:
            raise ValueError("counts is no compressed COCO RLE")
        starts = np.concatenate([[0], ends[:-1] + 1])
        if (ends - starts).max() >= MOST_CHARACTERS:
            raise ValueError("counts is no compressed COCO RLE: a run is too long")
        place = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
        found = np.add.reduceat((codes & 31) << place, starts)
        found -= np.where(codes[ends] & 16, np.int64(1) << (place[ends] + 5), 0)
        found[1::2] = np.cumsum(found[1::2])
        found[2::2] = np.cumsum(found[2::2])
    elif isinstance(counts, list) and counts and all(type(one) is int and 0 <= one <= pixels for one in counts):
        found = np.array(counts, np.int64)
    else:
        raise ValueError("counts is neither a text (compressed RLE) nor a list of whole numbers from 0 to h × w")
    if (found < 0).any() or found.sum() != pixels:
        raise ValueError(f"its runs do not fill the {pixels} pixels of `size`")
    return found


def segments_of(told: Any) -> Segments:
    """One image's JSON, a list of segments or a mapping with `annotations` → its segments. ValueError says what is wrong."""
    listed = told.get("annotations") if isinstance(told, dict) else told
    if not isinstance(listed, list):
        raise ValueError("no list of segments")
    sizes, runs, levels = set[tuple[int, int]](), [], []
    for number, one in enumerate(listed):
        try:
            (h, w), counts, level = one["segmentation"]["size"], one["segmentation"]["counts"], one.get("level", 0)
            if type(h) is not int or type(w) is not int or not (0 < h < MOST_PIXELS and 0 < w < MOST_PIXELS):
                raise ValueError(f"size is {[h, w]}, not [h, w] in px")
            if type(level) is not int or abs(level) >= 2**31:
                raise ValueError(f"level is {level!r}, not a whole number")
            lengths = run_lengths(counts, h * w)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"segment {number} is no mapping with segmentation: {{size: [h, w], counts: …}}") from None
        except ValueError as error:
            raise ValueError(f"segment {number}: {error}") from None
        sizes.add((h, w))
        if lengths[1::2].any():  # one without a pixel has no mean
            runs.append(lengths)
            levels.append(level)
    if len(sizes) > 1:
        raise ValueError(f"its segments differ in size: {sorted(sizes)}")
    return Segments(runs, np.array(levels, np.int64), next(iter(sizes), None))


def listed_files(folder: Path) -> list[str]:
    """Names of the JSON files at any depth, relative to folder, sorted; hidden ones (systems leave some) are passed over."""
    found = (path for path in folder.rglob(f"*{SUFFIX}") if path.is_file() and not path.name.startswith("."))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def pieces(path: Path, digest: Any) -> Iterator[tuple[str | None, str, int, bytes]]:
    """(id where the file's name tells it, name for errors, offset, JSON) of each image in a folder or a JSON Lines file.

    All is fed to `digest`: the bytes of a file; of a folder what `sha256sum` prints of its files, sorted by name.
    """
    if path.is_dir():
        for name in listed_files(path):
            data = (path / name).read_bytes()
            digest.update(f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode("utf-8", "surrogateescape"))
            yield name.removesuffix(SUFFIX), name, 0, data
        return
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if line.strip():
                yield None, f"line {number}", offset, line
            offset += len(line)


def checked_path(file: SegmentFile) -> Path:
    """ValueError if it is not there."""
    path = Path(file.path)
    if not path.is_dir() and not path.is_file():
        raise ValueError(
            f"fit_refiner.<m>.segments.path: there is no file or folder {path}; {FILE_HINT}, or choose another source (edit params.yaml)"
        )
    return path


def check_digest(file: SegmentFile, digest: Any) -> None:
    """ValueError that tells the digest to write down, unless it is the expected one."""
    found = digest.hexdigest()
    if found != file.sha256:
        raise ValueError(
            f"fit_refiner.<m>.segments.sha256: params.yaml has {file.sha256!r}, but {file.path} has {found}; if that is the file you "
            "mean, write this digest there, so that results follow the file (edit params.yaml)"
        )


def check(params: FitParams) -> None:
    """Long before the fit: ValueError unless a file of segments is there and is the one meant."""
    if isinstance(params.segments, SegmentFile):
        digest = hashlib.sha256()
        for _ in pieces(checked_path(params.segments), digest):
            pass
        check_digest(params.segments, digest)


def indexed(file: SegmentFile) -> tuple[dict[str, Entry], list[str]]:
    """One pass over the file → where each image's segments stand, and what is wrong with pieces of no image. ValueError
    where the file is missing or another one than meant."""
    digest, found, problems = hashlib.sha256(), dict[str, Entry](), list[str]()
    for image_id, name, offset, data in pieces(checked_path(file), digest):
        size = problem = None
        try:
            told = json.loads(data)
            if image_id is None and isinstance(told, dict):
                image_id = told.get("id")
            size = segments_of(told).size
        except (ValueError, RecursionError) as error:
            told = "no JSON, " if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError, RecursionError)) else ""
            problem = f"{name}: {told}{error}"
        if not isinstance(image_id, str):
            problems.append(problem or f"{name}: `id` must be a text, got {image_id!r}")
        elif image_id in found:
            problems.append(f"{name}: {image_id!r} was there before")
        else:
            found[image_id] = Entry(offset, len(data), hashlib.sha256(data).digest(), size, problem)
    check_digest(file, digest)
    return found, problems


# ---- fit --------------------------------------------------------------------------------------------------------------------


def fit(params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """State: `background` f32[1], `params` (FitParams as JSON, u8), and of a file the index of the images that have a class:
    `ids` (u8, between null characters), `place` i64[n,2] (offset and length in bytes), `sha256` u8[n,32].

    ValueError lists all that is wrong with the file: images that miss, other sizes, masks that cannot be read.
    """
    del images
    state = {"params": _bytes(json.dumps(dataclasses.asdict(params), sort_keys=True))}
    if not isinstance(params.segments, SegmentFile):
        return state | threshold.fit(params.background, maps)
    found, problems = indexed(params.segments)
    wanted: dict[str, tuple[int, int]] = {}

    def noted() -> Iterator[ImageMaps]:
        for one in maps:
            if len(one.classes):  # the others are background, whatever their segments
                wanted[one.id] = one.size
            yield one

    stream = noted()
    state |= threshold.fit(params.background, stream)
    for _ in stream:  # a fixed level reads no map
        pass
    problems += [text for image_id, size in wanted.items() if (text := mismatch(image_id, size, found.get(image_id)))]
    if problems:
        missing = any(one not in found for one in wanted)  # then other ids show how the file names images
        others = [one for one in found if one not in wanted] if missing else []
        raise ValueError(listing(Path(params.segments.path), problems, others))
    ids = sorted(wanted)
    state["ids"] = _bytes("\0".join(ids))
    state["place"] = np.array([found[one][:2] for one in ids], np.int64).reshape(-1, 2)
    state["sha256"] = np.frombuffer(b"".join(found[one].sha256 for one in ids), np.uint8).reshape(-1, 32)
    return state


def mismatch(image_id: str, size: tuple[int, int], entry: Entry | None) -> str | None:
    """What is wrong with an image's segments, or None."""
    if entry is None:
        return f"{image_id!r}: it has no segments of this image"
    if entry.problem:
        return f"{image_id!r}: {entry.problem}"
    if entry.size is not None and entry.size != size:
        return f"{image_id!r}: segments of {entry.size[0]} × {entry.size[1]} px, but the image has {size[0]} × {size[1]} (h × w)"
    return None


def listing(path: Path, problems: Sequence[str], others: Sequence[str]) -> str:
    """One text of all problems. others: ids of the file that no training image with a tag has."""
    lines = [
        f"{path}: {len(problems)} {'problem' if len(problems) == 1 else 'problems'} with its segments:",
        *problems[:SHOWN],
    ]
    lines += [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    lines += [f"it has {', '.join(map(repr, others[:5]))}, which no training image with a tag is called"] if others else []
    return "\n".join([*lines, FILE_HINT])


def _bytes(text: str) -> np.ndarray:
    """safetensors holds no texts."""
    return np.frombuffer(text.encode("utf-8"), np.uint8)


# ---- voting -----------------------------------------------------------------------------------------------------------------


def means_of_runs(scores: np.ndarray, runs: Sequence[np.ndarray]) -> np.ndarray:
    """f32[k,h,w] and s run lengths → f64[s,k] mean scores inside. One class's running sum at a time stands for the (S,HW)×(HW,C)
    product, so that no mask is ever laid out."""
    if not runs:
        return np.zeros((0, len(scores)))
    ends = [np.cumsum(one) for one in runs]
    first = np.concatenate([end[:-1:2] for end in ends])
    after = np.concatenate([end[1::2] for end in ends])
    segment = np.repeat(np.arange(len(runs)), [len(end) // 2 for end in ends])
    area = np.bincount(segment, after - first, len(runs))
    means = []
    for plane in scores:
        total = np.concatenate([[0.0], np.cumsum(plane.T, dtype=np.float64)])  # down the columns, as RLE runs
        means.append(np.bincount(segment, total[after] - total[first], len(runs)) / area)
    return np.stack(means, axis=1)


def means_of_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """f32[k,h,w] and a partition i64[h,w] from 0 on → f64[s,k] mean scores inside each segment."""
    flat = labels.ravel()
    area = np.maximum(np.bincount(flat), 1)
    return np.stack([np.bincount(flat, plane.ravel(), len(area)) / area for plane in scores], axis=1)


def power_at(level: float) -> float:
    """The power at which (1 - level)^power = level: a segment whose best class has just the level ties with background."""
    inside = min(max(level, threshold.LOWEST), threshold.HIGHEST)
    return float(np.log(inside) / np.log1p(-inside))


def votes(means: np.ndarray, *, normalise: str, power: float) -> np.ndarray:
    """f64[s,k] mean scores → f64[s,k+1] in 0..1, background's score (1 - best)^power in front. The highest wins.

    A class whose means hardly differ is left as it is under minmax, where FMA-WSSS makes it 0: one single segment has no spread.
    """
    found = np.clip(means, 0, 1)
    if normalise == "minmax" and len(found):
        low, spread = found.min(axis=0), np.ptp(found, axis=0)
        wide = spread > LEAST_SPREAD
        found[:, wide] = (found[:, wide] - low[wide]) / (spread[wide] + EPS)
    best = found.max(axis=1, keepdims=True)
    return np.concatenate([(1 - best) ** power, found], axis=1)


def painted(runs: Sequence[np.ndarray], levels: np.ndarray, confidence: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """i64[h,w]: which segment each pixel belongs to, ABSENT where none. Painted by ascending (level, confidence), as in FMA-WSSS:
    what comes later overwrites. Of equals, the smaller is painted later, then the later in the file."""
    h, w = size
    canvas = np.full(h * w, ABSENT)
    area = np.array([one[1::2].sum() for one in runs])
    for number in np.lexsort((-area, confidence, levels)):
        inside = np.arange(len(runs[number])) % 2 == 1
        canvas[np.repeat(inside, runs[number])] = number
    return canvas.reshape(w, h).T


def superpixels(image: np.ndarray, source: Felzenszwalb | Slic) -> np.ndarray:
    """u8[h,w,3] → a partition i64[h,w] from 0 on."""
    from skimage.segmentation import felzenszwalb, slic  # its import takes half a second, which a file does not need

    if isinstance(source, Felzenszwalb):
        return felzenszwalb(image, scale=source.scale, sigma=source.sigma, min_size=source.min_size, channel_axis=-1)
    return slic(
        image, n_segments=source.n_segments, compactness=source.compactness, sigma=source.sigma, start_label=0, channel_axis=-1
    )  # fmt: skip


class Refiner:
    """state: as `fit` makes it."""

    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        self.params = params
        self.fitted = float(state["background"][0])
        self.source = config.parse(FitParams, json.loads(state["params"].tobytes()), "fit_refiner").segments
        if isinstance(self.source, SegmentFile):
            ids = [one for one in state["ids"].tobytes().decode("utf-8").split("\0") if one]
            places, digests = state["place"].tolist(), state["sha256"]
            self.index = {one: (*place, row.tobytes()) for one, place, row in zip(ids, places, digests, strict=True)}

    def __call__(self, image: np.ndarray, maps: ImageMaps, level: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1, plane 0 background; all pixels of one segment have the same.

        ValueError for an image that `fit` has not seen, and if the file has changed since.
        """
        power = self.power(level)
        scores = planes.upsample(maps.scores, maps.size)
        if isinstance(self.source, SegmentFile):
            segments = self.segments(maps)
            found = votes(means_of_runs(scores, segments.runs), normalise=self.params.normalise, power=power)
            where = painted(segments.runs, segments.levels, found.max(axis=1), maps.size)
        else:
            where = superpixels(image, self.source)
            found = votes(means_of_labels(scores, where), normalise=self.params.normalise, power=power)
        shares = np.concatenate([found / found.sum(axis=1, keepdims=True), np.eye(1, found.shape[1])]).astype(np.float32)
        out = np.ascontiguousarray(shares.T[:, where])  # ABSENT is the last row, sure background
        if self.params.uncovered == "scores" and (bare := where == ABSENT).any():
            stacked = planes.with_background(scores[:, bare, None], level)[..., 0]
            out[:, bare] = stacked / stacked.sum(axis=0)
        return out

    def power(self, level: float) -> float:
        """Of the background. Other levels than the fitted one (refine's disagree_at) move a given power, too."""
        return power_at(level) * (1 if self.params.power is None else self.params.power / power_at(self.fitted))

    def segments(self, maps: ImageMaps) -> Segments:
        """One image's segments from the file."""
        assert isinstance(self.source, SegmentFile)
        if maps.id not in self.index:
            raise ValueError(f"{maps.id!r} was not among the images that fit_refiner saw; run it again")
        offset, length, digest = self.index[maps.id]
        path = Path(self.source.path)
        if path.is_dir():  # the id is the name of a file that `fit` listed in there
            path = path / (maps.id + SUFFIX)
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(length)
        if hashlib.sha256(data).digest() != digest:
            raise ValueError(
                f"{path}: the segments of {maps.id!r} have changed since fit_refiner read them; give the new sha256"
            )
        return segments_of(json.loads(data))
