"""A network that proposes objects, from a local file → segments of an image.

The file is checked by sha256 and travels in the refiner's state, so that refine needs nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Protocol

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load

from pipeline.core import refiner_state
from pipeline.core.config import Share
from pipeline.imaging import planes
from pipeline.refiners.segments.onnx_network import OnnxNetwork, OnnxOptions
from pipeline.refiners.segments.reader import Segments
from pipeline.refiners.segments.superpixels import Felzenszwalb, Slic, superpixels

ONNX = "onnx"  # key of the file's bytes in the state


@dataclass(frozen=True)
class SegmentNetwork:
    """Segments from a network that proposes objects, whatever their class.

    path         .safetensors: U²-Net, large or small, with folded batch norms | .onnx: any network, as `onnx` says
    sha256       of that file, 64 hexadecimal digits (`tag2mask weights list` has them)
    supervision  what the network learned from, for report and metrics: saliency (pixel masks of DUTS-TR), for U²-Net
    onnx         null for a .safetensors file, a mapping for an .onnx file
    threshold    from 0 to 1, at which a pixel of a map lies inside the object
    superpixels  null, or what the inside and the outside of a saliency map are cut into; null for masks
    """

    source: Literal["network"]
    path: str
    sha256: str
    supervision: str
    onnx: OnnxOptions | None
    threshold: Share
    superpixels: Annotated[Felzenszwalb | Slic, Field(discriminator="source")] | None

    def __post_init__(self) -> None:
        suffix = Path(self.path).suffix
        if suffix not in (".safetensors", ".onnx"):
            raise ValueError(f"path: got {self.path!r}, allowed is a .safetensors or an .onnx file")
        if not re.fullmatch("[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(
                f"sha256: got {self.sha256!r}, allowed are 64 hexadecimal digits, as `sha256sum {self.path}` prints them"
            )
        if not self.supervision.strip():
            raise ValueError("supervision: got '', allowed is what the network learned from, such as pixel masks of DUTS-TR")
        if (suffix == ".onnx") != (self.onnx is not None):
            raise ValueError("onnx: allowed is a mapping for an .onnx file, and null for a .safetensors file")
        if self.superpixels is not None and self.onnx is not None and self.onnx.proposals == "masks":
            raise ValueError("superpixels: got a mapping, allowed is null where onnx.proposals is masks")


class ProposalNetwork(Protocol):
    """What a network has to do to be a source of segments."""

    def to(self, device: str) -> None:
        """Moves to a torch device."""
        ...

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """u8[h,w,3] RGB → f32[n,gh,gw] in 0..1 over the whole image: a saliency map (n = 1), or a mask per object."""
        ...


def check(network: SegmentNetwork) -> None:
    """ValueError unless the file is there, has the sha256 of its settings and holds a network that can be built."""
    network_of(network, state_of(network))


def state_of(network: SegmentNetwork) -> dict[str, np.ndarray]:
    """The file → its part of the refiner's state. ValueError where it is missing, another file, or cannot be read."""
    path = Path(network.path)
    if not path.is_file():
        raise ValueError(
            f"fit_refiner.segments.path: there is no file {path}; `python -m stages.weights list` says where to get it "
            "(or edit the recipe)"
        )
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != network.sha256.lower():
        raise ValueError(
            f"fit_refiner.segments.sha256: the recipe has {network.sha256!r}, but {path} has {actual}; if that is the file "
            f"you mean, write this digest there (`python -m stages.weights check {path}` says what it is; edit the recipe)"
        )
    if network.onnx is not None:
        return {ONNX: np.frombuffer(data, np.uint8)}
    try:
        return {refiner_state.NETWORK + name: value for name, value in load(data).items()}
    except SafetensorError as error:
        raise ValueError(f"fit_refiner.segments.path: {path} is no safetensors file: {error} (edit the recipe)") from None


def network_of(network: SegmentNetwork, state: Mapping[str, np.ndarray]) -> ProposalNetwork:
    """ValueError where the state's tensors or bytes are no network of the kind that the settings say."""
    if network.onnx is not None:
        return OnnxNetwork(state[ONNX].tobytes(), network.onnx, network.path)
    from pipeline.refiners.segments.u2net import Saliency  # imports torch, which the other sources do not need

    return Saliency(refiner_state.network_tensors(state), network.path)


def segments_of(network: SegmentNetwork, maps: np.ndarray, image: np.ndarray) -> np.ndarray | Segments:
    """A network's maps f32[n,gh,gw] of an image → a partition i64[h,w] by saliency, or n segments that may overlap."""
    size = (image.shape[0], image.shape[1])
    if network.onnx is not None and network.onnx.proposals == "masks":
        masks = (planes.upsample(one[None], size)[0] >= network.threshold for one in maps)
        runs = [run_lengths(mask) for mask in masks if mask.any()]
        return Segments(runs, np.zeros(len(runs), np.int64), size)
    inside = planes.upsample(maps, size)[0] >= network.threshold
    return cut(inside, None if network.superpixels is None else superpixels(image, network.superpixels))


def cut(inside: np.ndarray, parts: np.ndarray | None) -> np.ndarray:
    """bool[h,w], the salient pixels → i64[h,w] from 0 on: connected parts of inside and outside, each cut by the
    superpixels i64[h,w], so that no segment crosses the border of a salient object."""
    from skimage.measure import label

    numbers = inside.astype(np.int64) if parts is None else 2 * parts + inside
    return np.asarray(label(numbers, background=-1, connectivity=1), np.int64) - 1


def run_lengths(mask: np.ndarray) -> np.ndarray:
    """bool[h,w] → i64[·] lengths of runs, column by column, outside first (COCO RLE; `reader.Segments.runs`)."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    lengths = np.diff(np.concatenate([[0], borders, [flat.size]]))
    return np.concatenate([[0], lengths]) if flat[0] else lengths
