"""Any ONNX network that proposes objects, through onnxruntime: an image → maps of where they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from pipeline.core.config import AboveZero, Positive
from pipeline.imaging import planes

MISSING = (
    "fit_refiner.segments.path: an .onnx file needs onnxruntime (pip install 'tag2mask[onnx]', or pip install onnxruntime)"
)


@dataclass(frozen=True)
class OnnxOptions:
    """How an ONNX network is fed and read. It takes one image f32[1,3,h,w]; its first output is read.

    size       px of the square that an image is resized to; null: its own size
    divide_by  what pixel values from 0 to 255 are divided by: 255, or the image's maximum
    mean, std  of the three channels, red first, after the division
    proposals  saliency: one map, bright on objects | masks: a map per object, which may overlap
    values     how the output comes to lie in 0..1: as_is | sigmoid, of logits | minmax, per image
    """

    size: Positive | None
    divide_by: Literal["255", "maximum"]
    mean: tuple[float, float, float]
    std: tuple[AboveZero, AboveZero, AboveZero]
    proposals: Literal["saliency", "masks"]
    values: Literal["as_is", "sigmoid", "minmax"]


class OnnxNetwork:
    """A ProposalNetwork. model: the file's bytes. It computes on the CPU, with one thread, so that sums keep their order.

    ValueError where onnxruntime is missing or refuses the file.
    """

    def __init__(self, model: bytes, options: OnnxOptions, source: str) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(MISSING) from None
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.use_deterministic_compute = True
        settings.log_severity_level = 3  # its warnings are about how a graph was exported
        self.options, self.source = options, source
        try:
            self.session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise ValueError(f"{source} is no ONNX file that onnxruntime can run: {error}") from None
        inputs = self.session.get_inputs()
        if len(inputs) != 1 or inputs[0].type != "tensor(float)" or len(inputs[0].shape) != 4:
            described = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise ValueError(f"{source}: allowed is one input, float32[1,3,h,w]; it has {described}")

    def to(self, device: str) -> None:
        """Stays on the CPU."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """u8[h,w,3] → f32[n,gh,gw] in 0..1."""
        photograph, options = Image.fromarray(image), self.options
        if options.size is not None:
            photograph = photograph.resize((options.size, options.size), Image.Resampling.BILINEAR)
        pixels = np.array(photograph, np.float32)
        pixels /= 255.0 if options.divide_by == "255" else max(pixels.max(), 1.0)
        pixels = (pixels - np.array(options.mean, np.float32)) / np.array(options.std, np.float32)
        tensor = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], np.float32)
        try:
            output: Any = self.session.run(None, {self.session.get_inputs()[0].name: tensor})[0]
        except Exception as error:  # its exceptions have no common class
            raise ValueError(f"{self.source} does not take an image of {tensor.shape[2:]} px: {error}") from None
        return self._in_range(self._maps(np.asarray(output, np.float32)))

    def _maps(self, output: np.ndarray) -> np.ndarray:
        """[h,w], [n,h,w] or [1,n,h,w] → f32[n,h,w]."""
        shape = output.shape
        if output.ndim == 4 and shape[0] == 1:
            output = output[0]
        if output.ndim == 2:
            output = output[None]
        if output.ndim != 3 or (self.options.proposals == "saliency" and len(output) != 1):
            allowed = "[1,1,h,w]" if self.options.proposals == "saliency" else "[1,n,h,w]"
            raise ValueError(
                f"{self.source}: its first output is {list(shape)}, allowed is {allowed} for onnx.proposals "
                f"{self.options.proposals} (edit the recipe)"
            )
        return output

    def _in_range(self, maps: np.ndarray) -> np.ndarray:
        if not np.isfinite(maps).all():
            raise ValueError(f"{self.source}: its output has values that are not finite")
        if self.options.values == "sigmoid":
            return 0.5 * (1 + np.tanh(0.5 * maps))
        if self.options.values == "minmax":
            return planes.stretched(maps)
        if maps.size and (maps.min() < 0 or maps.max() > 1):
            raise ValueError(
                f"{self.source}: its output goes from {maps.min():.3g} to {maps.max():.3g}, not from 0 to 1; "
                "set onnx.values to sigmoid or minmax (edit the recipe)"
            )
        return maps
