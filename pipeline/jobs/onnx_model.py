"""An exported segmenter: what its ONNX file says about itself, and masks by onnxruntime. Imports no torch.

Needs `pip install 'tag2mask[onnx]'`. Shape letters: p planes (background and c classes), h w pixels.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import config, store
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.sections import Segment
from pipeline.imaging import planes
from pipeline.jobs import windows
from pipeline.mask_files import hex_of, legend

FORMAT = "tag2mask segmenter 1"
INPUT, OUTPUT = "images", "logits"
INPUT_TEXT = "f32[batch,3,height,width] RGB in 0..1, any size; normalisation and padding are inside the graph"
OUTPUT_TEXT = "f32[batch,planes,height,width] logits; softmax over planes gives probabilities, argmax mask values"


@dataclass(frozen=True)
class Metadata:
    """What an ONNX file holds beside its graph.

    segment       section segment of the recipe: windows, scales, mirror images
    supervision   what the masks that it was trained on have learned from: tags, mostly
    run, segmenter, sha256   the run's name, its segmenter, and the digest of its segmenter.safetensors
    version       of tag2mask
    quantisation  none, dynamic or static
    """

    labels: LabelSpace
    segment: Segment
    supervision: str
    run: str
    segmenter: str
    sha256: str
    version: str
    quantisation: str

    def properties(self) -> dict[str, str]:
        """Texts by name, as metadata_props of an ONNX model: values are JSON where they are no plain text."""
        named = legend(self.labels)
        classes = [{"value": value, "name": name, "color": hex_of(value)} for value, name in named.items()]
        return {
            "format": FORMAT,
            "tag2mask_version": self.version,
            "input": INPUT_TEXT,
            "output": OUTPUT_TEXT,
            "names": json.dumps(self.labels.names, ensure_ascii=False),
            "classes": json.dumps(classes, ensure_ascii=False),
            "background": str(BACKGROUND),
            "ignore": str(IGNORE),
            "segment": json.dumps(dataclasses.asdict(self.segment), sort_keys=True),
            "supervision": self.supervision,
            "run": self.run,
            "segmenter": self.segmenter,
            "segmenter_sha256": self.sha256,
            "quantisation": self.quantisation,
        }

    @classmethod
    def of(cls, properties: Mapping[str, str], path: Path) -> Metadata:
        """ValueError where the file was not written by `tag2mask export-model`, or by another version of the format."""
        written = properties.get("format")
        if written != FORMAT:
            raise ValueError(
                f"{path} is no model of `tag2mask export-model` of this version: its format is {written!r}, not {FORMAT!r}"
            )
        return cls(
            labels=LabelSpace(tuple(json.loads(properties["names"]))),
            segment=config.parse(Segment, json.loads(properties["segment"]), "segment", path),
            supervision=properties["supervision"],
            run=properties["run"],
            segmenter=properties["segmenter"],
            sha256=properties["segmenter_sha256"],
            version=properties["tag2mask_version"],
            quantisation=properties["quantisation"],
        )


def require(*packages: str) -> None:
    """ValueError where one of the optional packages is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'tag2mask[onnx]'")


@lru_cache(maxsize=1)
def session(path: Path, sha256: bytes) -> Any:
    """An inference session with one thread, kept for as long as the file is the same. ValueError if it is no ONNX model."""
    del sha256
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # cores serve images, and sums keep their order
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own kinds of errors have no common base
        raise ValueError(f"{path} is no ONNX model that onnxruntime can run: {error}") from error


@dataclass(frozen=True)
class OnnxSegmenter:
    """Predictor of segment_folder, picklable: each process opens the file."""

    path: Path
    sha256: bytes
    metadata: Metadata
    device: str = "cpu"

    @classmethod
    def read(cls, path: Path) -> OnnxSegmenter:
        """ValueError where the file is missing or no exported segmenter, or onnxruntime is missing."""
        require("onnxruntime")
        if not path.is_file():
            raise ValueError(f"{path} is missing; write it by `tag2mask export-model RUN --onnx {path}`")
        sha256 = bytes.fromhex(store.file_digest(path))
        properties = session(path.resolve(), sha256).get_modelmeta().custom_metadata_map
        return cls(path.resolve(), sha256, Metadata.of(properties, path))

    @property
    def labels(self) -> LabelSpace:
        return self.metadata.labels

    @property
    def name(self) -> str:
        return self.metadata.run

    def description(self) -> dict[str, Any]:
        """What masks depend on."""
        settings = store.digest(dataclasses.asdict(self.metadata.segment))
        return {"method": self.metadata.run, "segmenter": self.sha256.hex(), "settings": settings}

    def mask(self, image: np.ndarray) -> np.ndarray:
        """u8[h,w,3] RGB → u8[h,w] mask values. No CRF, whatever section segment says."""
        opened = session(self.path, self.sha256)
        mean = probabilities(
            image,
            lambda batch: opened.run([OUTPUT], {INPUT: batch})[0],
            self.metadata.segment,
            planes_count=len(self.labels) + 1,
        )
        return planes.winners(mean, image.shape[:2])[0]


def probabilities(
    image: np.ndarray, segment: Callable[[np.ndarray], np.ndarray], settings: Segment, *, planes_count: int
) -> np.ndarray:
    """u8[h,w,3] → f32[p,h,w], as jobs/segment.py's: the mean of the softmax over all scales and mirror images.

    segment: f32[b,3,h,w] → logits f32[b,p,h,w]
    """
    canvas = windows.bounded((image.shape[0], image.shape[1]), planes_count)
    total = np.zeros((planes_count, *canvas), np.float32)
    for pixels, mirrorings in windows.views(image, settings, planes_count):
        view = np.moveaxis(pixels, -1, 0).astype(np.float32) / 255
        for mirrored in mirrorings:
            logits = windowed(view[..., ::-1] if mirrored else view, segment, settings)
            total += softmax(interpolated(logits[..., ::-1] if mirrored else logits, canvas))
    return total / windows.view_count(settings)


def windowed(view: np.ndarray, segment: Callable[[np.ndarray], np.ndarray], settings: Segment) -> np.ndarray:
    """f32[3,h,w] → logits f32[p,h,w], averaged where windows overlap."""
    h, w = view.shape[-2:]
    total, count = None, np.zeros((h, w), np.float32)
    for corners in windows.batches((h, w), settings):
        logits = segment(np.stack([view[:, rows, columns] for rows, columns in corners]))
        if total is None:
            total = np.zeros((logits.shape[1], h, w), np.float32)
        for (rows, columns), window in zip(corners, logits, strict=True):
            total[:, rows, columns] += window
            count[rows, columns] += 1
    assert total is not None  # there is at least one window
    return total / count


def interpolated(stacked: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """f32[p,h,w] → f32[p,*size], bilinear with half-pixel centres and no antialiasing, as torch's interpolate."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = stacked.shape[axis]
        if old == new:
            continue
        place = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
        first = place.astype(np.int64)
        weight = (place - first).reshape((-1, 1) if axis == 1 else (-1,))
        low, high = (np.take(stacked, np.minimum(first + more, old - 1), axis) for more in (0, 1))
        stacked = low + (high - low) * weight
    return stacked


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the first axis, f32."""
    raised = np.exp(logits - logits.max(axis=0))
    return raised / raised.sum(axis=0)
