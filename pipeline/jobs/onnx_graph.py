"""A trained segmenter → an ONNX graph for any number and size of images, and its int8 form.

torch's tracing exporter follows sizes as values, so one trace serves all sizes; its successor, which reasons about sizes in
symbols, takes a minute for a ViT and does not end for a MiT. Two things are ours: padding to the stride and cropping back
are nodes around the network, as pad_to_stride (nn/weights.py) does it; and what the exporter lacks, the resampling of a
ViT's position embeddings and the pooling of a map to a fixed size, is done by two matrices each.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.jobs.onnx_model import INPUT, OUTPUT

OPSET = 18
PADDED, PADDED_OUTPUT = "padded_images", "padded_logits"
CONV, MATMUL = {"Conv", "ConvTranspose"}, {"MatMul", "Gemm"}


class Logits(nn.Module):
    """images f32[b,3,h,w] → logits f32[b,p,h,w], with the options of section segment."""

    def __init__(self, segmenter: Any, options: Any) -> None:
        super().__init__()
        self.segmenter, self.options = segmenter, options

    def forward(self, images: Tensor) -> Tensor:
        return self.segmenter.segment(images, self.options)


def model_of(segmenter: Any, options: Any) -> Any:
    """The segmenter, in eval mode on the CPU, as onnx.ModelProto. ValueError where an architecture cannot be exported."""
    import onnx

    stride = segmenter.backbone.stride
    sizes = {0: "batch", 2: "height", 3: "width"}
    buffer = io.BytesIO()
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), linear_maps_by_matrices(), torch.no_grad():
        warnings.simplefilter("ignore")  # of a trace that does not follow every branch
        try:
            sink: Any = buffer  # the stub knows paths only
            torch.onnx.export(
                Logits(segmenter, options).eval(), (torch.zeros(2, 3, 4 * stride, 6 * stride),), sink, input_names=[PADDED],
                output_names=[PADDED_OUTPUT], dynamic_axes={PADDED: sizes, PADDED_OUTPUT: sizes}, opset_version=OPSET,
                dynamo=False,
            )  # fmt: skip
        except Exception as error:  # the exporter's own kinds of errors have no common base
            raise ValueError(f"this segmenter cannot be written as ONNX: {str(error).splitlines()[0]}") from error
    planes = segmenter.segment(torch.zeros(1, 3, stride, stride), options).shape[1]
    mean = segmenter.backbone.normalise.mean.flatten().tolist()
    return with_padding(onnx.load_from_string(buffer.getvalue()), stride, mean, planes)


@contextmanager
def linear_maps_by_matrices() -> Iterator[None]:
    """timm's ViTs resample their position embeddings by `resampled`, and torch pools by `pooled`, to the same values."""
    from timm.layers import pos_embed

    replaced = []
    for original, ours in ((pos_embed.resample_abs_pos_embed, resampled), (F.adaptive_avg_pool2d, pooled)):
        users = [module for module in list(sys.modules.values()) if vars(module).get(original.__name__) is original]
        replaced += [(module, original) for module in users]
        for module in users:
            setattr(module, original.__name__, ours)
    try:
        yield
    finally:
        for module, original in replaced:
            setattr(module, original.__name__, original)


def pooled(maps: Tensor, output_size: Any) -> Tensor:
    """f32[b,c,h,w] → f32[b,c,*output_size], torch's adaptive average pooling. output_size: one number, or two."""
    rows, columns = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    return averages(maps.shape[-2], rows) @ maps @ averages(maps.shape[-1], columns).T


def averages(old: Any, new: int) -> Tensor:
    """f32[new,old]: each row the mean over a cell of torch's adaptive pooling along one side."""
    place, cell = torch.arange(old)[None], torch.arange(new)[:, None]
    inside = (place >= cell * old // new) & (place < ((cell + 1) * old + new - 1) // new)
    return inside.float() / inside.float().sum(dim=1, keepdim=True)


def resampled(posemb: Tensor, new_size: Any, old_size: Any, num_prefix_tokens: int = 1, **unused: Any) -> Tensor:
    """Position embeddings f32[1,prefix+n,dim] of an old grid → of a new one, (rows, columns) each."""
    del unused
    prefix, cells = posemb[:, :num_prefix_tokens], posemb[:, num_prefix_tokens:].float()
    dim = posemb.shape[-1]
    tall = (bicubic(new_size[0], old_size[0]) @ cells.reshape(old_size[0], -1)).reshape(-1, old_size[1], dim)
    return torch.cat([prefix, (bicubic(new_size[1], old_size[1]) @ tall).reshape(1, -1, dim)], dim=1)


def bicubic(new: Any, old: int) -> Tensor:
    """f32[new,old]: weights of torch's bicubic interpolation with antialiasing along one side (Keys 1981, a = -0.5)."""
    scale = old / (torch.ones(()) * new)
    centres = (torch.arange(new) + 0.5) * scale
    x = ((torch.arange(old) + 0.5)[None] - centres[:, None]).abs() / scale.clamp(min=1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    kernel = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros(())))
    return kernel / kernel.sum(dim=1, keepdim=True)


def with_padding(model: Any, stride: int, mean: list[float], planes: int) -> Any:
    """A model of padded_images → padded_logits becomes one of images → logits, of any size.

    Padding lies right and below; it is the mean of the network's normalisation, so 0 behind it.
    """
    import onnx

    before = onnx.parser.parse_graph(f"""
        pad (float[batch,3,height,width] {INPUT}) => (float[batch,3,h,w] {PADDED})
        <float[1,3,1,1] pad_mean = {{{", ".join(map(repr, mean))}}}, int64[1] pad_stride = {{{stride}}},
         int64[1] pad_channels = {{3}}> {{
            pad_batch = Shape <start = 0, end = 1> ({INPUT})
            pad_height = Shape <start = 2, end = 3> ({INPUT})
            pad_width = Shape <start = 3, end = 4> ({INPUT})
            pad_rest_height = Mod (pad_height, pad_stride)
            pad_rest_width = Mod (pad_width, pad_stride)
            pad_most_below = Sub (pad_stride, pad_rest_height)
            pad_most_right = Sub (pad_stride, pad_rest_width)
            pad_below = Mod (pad_most_below, pad_stride)
            pad_right = Mod (pad_most_right, pad_stride)
            pad_size_below = Concat <axis = 0> (pad_batch, pad_channels, pad_below, pad_width)
            pad_rows = Expand (pad_mean, pad_size_below)
            pad_tall = Concat <axis = 2> ({INPUT}, pad_rows)
            pad_tall_height = Add (pad_height, pad_below)
            pad_size_right = Concat <axis = 0> (pad_batch, pad_channels, pad_tall_height, pad_right)
            pad_columns = Expand (pad_mean, pad_size_right)
            {PADDED} = Concat <axis = 3> (pad_tall, pad_columns)
        }}""")
    after = onnx.parser.parse_graph(f"""
        crop (float[batch,{planes},h,w] {PADDED_OUTPUT}, int64[1] pad_height, int64[1] pad_width)
        => (float[batch,{planes},height,width] {OUTPUT})
        <int64[2] crop_starts = {{0, 0}}, int64[2] crop_axes = {{2, 3}}> {{
            crop_ends = Concat <axis = 0> (pad_height, pad_width)
            {OUTPUT} = Slice ({PADDED_OUTPUT}, crop_starts, crop_ends, crop_axes)
        }}""")
    graph = model.graph
    nodes = [*before.node, *graph.node, *after.node]
    for field, values in (("node", nodes), ("input", [before.input[0]]), ("output", [after.output[0]])):
        kept = [type(value).FromString(value.SerializeToString()) for value in values]
        graph.ClearField(field)
        getattr(graph, field).extend(kept)
    graph.initializer.extend([*before.initializer, *after.initializer])
    graph.ClearField("value_info")  # sizes of inner tensors as the exporter saw them: onnxruntime infers its own
    onnx.checker.check_model(model, full_check=False)
    return model


def weights_in(model: Any, kinds: set[str]) -> int:
    """Number of weights that nodes of these kinds read."""
    used = {name for node in model.graph.node if node.op_type in kinds for name in node.input}
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer if tensor.name in used)


def quantise(source: Path, target: Path, batches: Iterable[np.ndarray]) -> str:
    """Writes an int8 form of an ONNX file. batches: images f32[b,3,h,w], what activations are measured on.

    Returns dynamic for networks of matrix products (their activations are measured as they run), static for those of
    convolutions, which onnxruntime runs slowly where they are dynamic.
    """
    import onnx
    from onnxruntime import quantization

    model = onnx.load(source)
    logging.getLogger().addFilter(_no_preprocessing)
    try:
        if weights_in(model, MATMUL) >= weights_in(model, CONV):
            quantization.quantize_dynamic(
                source, target, op_types_to_quantize=sorted(MATMUL), weight_type=quantization.QuantType.QInt8
            )
            return "dynamic"
        quantization.quantize_static(
            source, target, _reader(iter(batches)), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=sorted(CONV | MATMUL),
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        return "static"
    finally:
        logging.getLogger().removeFilter(_no_preprocessing)


def _no_preprocessing(record: logging.LogRecord) -> bool:
    """onnxruntime advises to fold batch norms first, which the exporter has done."""
    return "pre-processing before quantization" not in record.getMessage()


def _reader(batches: Iterator[np.ndarray]) -> Any:
    """Batches as onnxruntime's calibration reads them."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(batches, None)
            return None if batch is None else {INPUT: batch}

    return Reader()
