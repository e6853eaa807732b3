"""Class-agnostic segments, each given one label by the score maps inside it (SAM-based seeding of FMA-WSSS, which SemPLeS
takes).

Segments are superpixels of the image, masks from a file, or what a network proposes. Shape letters: s segments, k classes
present in the image, h w its pixels, n images.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from pipeline.core import config
from pipeline.core.config import AboveZero
from pipeline.core.contracts import ImageMaps
from pipeline.imaging import planes
from pipeline.imaging.threshold import Threshold
from pipeline.imaging.threshold import fit as fit_threshold
from pipeline.refiners.segments import network, reader, voting
from pipeline.refiners.segments.network import SegmentNetwork
from pipeline.refiners.segments.reader import SegmentFile, Segments
from pipeline.refiners.segments.superpixels import Felzenszwalb, Slic, superpixels

__all__ = ["FitParams", "Params", "Refiner", "check", "fit", "supervision"]


@dataclass(frozen=True)
class FitParams:
    """Section fit_refiner.

    threshold  where a score stops being background
    segments   where segments come from: the keys of one `source`
    """

    threshold: Threshold
    segments: Annotated[SegmentFile | SegmentNetwork | Felzenszwalb | Slic, Field(discriminator="source")]


@dataclass(frozen=True)
class Params:
    """refine.options.

    normalise  minmax: each class's mean scores go from 0 to 1 over the image's segments (FMA-WSSS); none: means as they are
    power      background's score is (1 - best class)^power. A number is the power at the fitted threshold (FMA-WSSS: 0.6 to
               1.0 on VOC and COCO). null: the power at which a segment whose best class just reaches the threshold ties with
               background
    uncovered  pixels in no segment: background (FMA-WSSS), or what the score maps say there against the threshold
    """

    normalise: Literal["minmax", "none"]
    power: AboveZero | None
    uncovered: Literal["background", "scores"]


def check(params: FitParams) -> None:
    """ValueError, before anything is trained, unless a file of segments or of a network is there and has the sha256 of
    params."""
    if isinstance(params.segments, SegmentFile):
        reader.check(params.segments)
    if isinstance(params.segments, SegmentNetwork):
        network.check(params.segments)


def supervision(params: FitParams) -> str | None:
    """What stands behind the segments beside image-level tags; None for superpixels, which learn nothing."""
    if isinstance(params.segments, SegmentNetwork):
        return params.segments.supervision
    return "segments from a file" if isinstance(params.segments, SegmentFile) else None


def fit(params: FitParams, maps: Iterable[ImageMaps], images: Callable[[int], np.ndarray]) -> dict[str, np.ndarray]:
    """State: `threshold` f32[1], `params` u8[·] (FitParams as JSON), of a file of segments the index of the images that have
    a class (reader.as_state), and of a network its weights (network.state_of).

    ValueError lists all that is wrong with the file: images that are missing, other sizes, masks that cannot be read.
    """
    del images
    state = {"params": np.frombuffer(json.dumps(dataclasses.asdict(params), sort_keys=True).encode("utf-8"), np.uint8)}
    if isinstance(params.segments, SegmentNetwork):
        state |= network.state_of(params.segments)
    if not isinstance(params.segments, SegmentFile):
        return state | fit_threshold(params.threshold, maps)
    entries, problems = reader.index(params.segments)
    sizes: dict[str, tuple[int, int]] = {}

    def with_sizes_noted() -> Iterator[ImageMaps]:
        for image in maps:
            if len(image.classes):  # an image without a class is background, whatever its segments
                sizes[image.id] = image.size
            yield image

    stream = with_sizes_noted()
    state |= fit_threshold(params.threshold, stream)
    for _ in stream:  # a fixed threshold reads no map
        pass
    reader.require(params.segments, entries, sizes, problems)
    return state | reader.as_state({image_id: entries[image_id].place for image_id in sizes})


class Refiner:
    """state: as `fit` makes it."""

    def __init__(self, params: Params, state: Mapping[str, np.ndarray]) -> None:
        self.params = params
        self.fitted = float(state["threshold"][0])
        self.source = config.parse(FitParams, json.loads(state["params"].tobytes()), "fit_refiner").segments
        self.index = reader.from_state(state) if isinstance(self.source, SegmentFile) else {}
        self.network = network.network_of(self.source, state) if isinstance(self.source, SegmentNetwork) else None
        self._last: tuple[np.ndarray, np.ndarray | Segments] | None = None  # an image and its segments

    def to(self, device: str) -> None:
        """Moves the network, where segments come from one, to a torch device."""
        if self.network is not None:
            self.network.to(device)

    def __call__(self, image: np.ndarray, maps: ImageMaps, threshold: float) -> np.ndarray:
        """f32[k+1,h,w] that sums to 1 over the planes, plane 0 background; all pixels of one segment have the same.

        ValueError for an image that `fit` has not seen, and if the file has changed since.
        """
        scores = planes.upsample(maps.scores, maps.size)
        votes, segment = self._votes(image, maps, scores, self.power(threshold))
        sure_background = np.eye(1, votes.shape[1])
        probabilities = np.concatenate([votes / votes.sum(axis=1, keepdims=True), sure_background]).astype(np.float32)
        out = np.ascontiguousarray(probabilities.T[:, segment])  # ABSENT, -1, is the last row
        if self.params.uncovered == "scores" and (uncovered := segment == voting.ABSENT).any():
            stacked = planes.with_background(scores[:, uncovered, None], threshold)[..., 0]
            out[:, uncovered] = stacked / stacked.sum(axis=0)
        return out

    def _votes(self, image: np.ndarray, maps: ImageMaps, scores: np.ndarray, power: float) -> tuple[np.ndarray, np.ndarray]:
        """f64[s,k+1] scores of each segment, background first, and i64[h,w] the segment of each pixel, or ABSENT."""
        segments = self._segments(image, maps.id)
        if isinstance(segments, np.ndarray):
            means = voting.means_of_labels(scores, segments)
            return voting.votes(means, normalise=self.params.normalise, power=power), segments
        means = voting.means_of_runs(scores, segments.runs)
        votes = voting.votes(means, normalise=self.params.normalise, power=power)
        return votes, voting.painted(segments.runs, segments.levels, votes.max(axis=1), maps.size)

    def _segments(self, image: np.ndarray, image_id: str) -> np.ndarray | Segments:
        """A partition of the pixels, i64[h,w] from 0 on, or segments that may overlap."""
        if isinstance(self.source, SegmentFile):
            if image_id not in self.index:
                raise ValueError(f"{image_id!r} was not among the images that fit_refiner saw; run it again")
            return reader.read(self.source, image_id, self.index[image_id])
        if self._last is None or self._last[0] is not image:  # refine asks again for other thresholds (disagree_at)
            self._last = image, self._computed(image)
        return self._last[1]

    def _computed(self, image: np.ndarray) -> np.ndarray | Segments:
        if isinstance(self.source, (Felzenszwalb, Slic)):
            return superpixels(image, self.source)
        assert isinstance(self.source, SegmentNetwork) and self.network is not None
        return network.segments_of(self.source, self.network(image), image)

    def power(self, threshold: float) -> float:
        """Of the background. Other thresholds than the fitted one (refine's disagree_at) move a given power, too."""
        fitted = self.params.power
        return voting.power_at(threshold) * (1 if fitted is None else fitted / voting.power_at(self.fitted))
