"""Encoders of segmentation_models_pytorch → feature maps, with norms that see one image at a time.

The package is optional: `pip install 'tag2mask[smp]'`. f32[b,3,h,w] in 0..1 → maps f32[b,·,h/2^i,w/2^i], finest first.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import timm  # noqa: E402

PACKAGE = "segmentation_models_pytorch"
DECODERS = {
    "unet": "Unet", "unetplusplus": "UnetPlusPlus", "manet": "MAnet", "linknet": "Linknet", "fpn": "FPN",
    "pspnet": "PSPNet", "deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3Plus", "upernet": "UPerNet",
    "segformer": "Segformer",
}  # fmt: skip
# given by Params, or another task than segmentation
OURS = {
    "self", "encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "activation", "aux_params",
    "kwargs",
}  # fmt: skip
GROUPS = 8  # of a group norm, or the largest divisor of 8 that divides the channels
TIMM = ("tu-", "timm-")  # prefixes of timm's encoders


class Backbone(nn.Module):
    """An encoder behind the normalisation of its pre-training. Batch norms, if any are left, keep their statistics.

    stride  px; image sides must be multiples of it
    """

    def __init__(self, encoder: Any, name: str) -> None:
        super().__init__()
        self.encoder, self.stride = encoder, int(encoder.output_stride)
        self.normalise = weights.Normalise(*statistics(name))

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """The normalised images and the maps of all depths, as the package's decoders take them."""
        return self.encoder(self.normalise(images))


class GroupNorm(nn.GroupNorm):
    """In place of a batch norm, whose scale and shift it takes over; with the drop and activation of timm's fused norms."""

    def __init__(self, norm: Any) -> None:
        super().__init__(math.gcd(norm.num_features, GROUPS), norm.num_features, eps=norm.eps, affine=norm.affine)
        self.drop, self.act = (getattr(norm, part, None) or nn.Identity() for part in ("drop", "act"))
        if norm.affine:
            self.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def grouped(module: nn.Module) -> nn.Module:
    """The module with every batch norm in it replaced, in place."""
    for name, child in module.named_children():
        setattr(module, name, GroupNorm(child) if isinstance(child, _BatchNorm) else grouped(child))
    return module


def network(decoder: str, encoder: str, depth: int, planes: int, options: Mapping[str, Any]) -> Any:
    """The package's model with random weights: `encoder`, `decoder` and `segmentation_head` are its parts.

    options: further arguments of its class. ValueError names what is not allowed.
    """
    smp = _package()
    kind = getattr(smp, DECODERS[decoder])
    allowed = sorted(set(inspect.signature(kind.__init__).parameters) - OURS)
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise ValueError(f"decoder_options: unknown {', '.join(unknown)}; allowed for {decoder} are {', '.join(allowed)}")
    if not encoder.startswith("tu-") and encoder not in smp.encoders.get_encoder_names():
        raise ValueError(
            f"encoder: {PACKAGE} has no {encoder!r}; there are resnet18, mit_b0 and others in its documentation, and any "
            "convolutional network of timm as tu-NAME"
        )
    given = copy.deepcopy(dict(options))  # the package may change lists
    try:
        return kind(encoder, encoder_depth=depth, encoder_weights=None, in_channels=3, classes=planes, **given)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{decoder} × {encoder} at depth {depth} cannot be built: {error}") from error


def check(decoder: str, encoder: str, depth: int, options: Mapping[str, Any]) -> None:
    """ValueError where the package is missing, or the network cannot be built or label an image. Draws no random number
    that others would miss."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        built = network(decoder, encoder, depth, 2, options).eval()
        side = built.encoder.output_stride  # the smallest
        try:
            built(torch.zeros(1, 3, side, side))
        except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
            raise ValueError(f"{decoder} × {encoder} at depth {depth} cannot label an image: {error}") from error


def statistics(encoder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel that the encoder was pre-trained with: timm's; else ImageNet's."""
    name = next((encoder.removeprefix(prefix) for prefix in TIMM if encoder.startswith(prefix)), "")
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True) if name else None
    if settings is None:
        return weights.IMAGENET_MEAN, weights.IMAGENET_STD
    return tuple(settings.mean), tuple(settings.std)


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """ValueError: these encoders serve a segmenter alone, since methods read maps at other strides."""
    raise ValueError("backbone smp serves segmenters only; set methods.<run>.backbone to vit, resnet or mit in params.yaml")


def load_initial(backbone: Backbone, init: Path) -> None:
    """Loads the encoder's weights from a local file or from timm's hub (.hub file); nothing for a .txt file.

    Every tensor of the encoder must be in the file. Its names are the package's, alone or in a whole model, or timm's.
    ValueError lists what is missing or misshapen. Counters of batch norms may be missing, as in old files.
    """
    tensors = weights.initial_tensors(init)
    if tensors is None:
        return
    own = backbone.encoder.state_dict()
    matching = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    for name in own:
        published = next((other for other in _published(name) if other in tensors), None)
        if published is not None:
            matching[name] = tensors[published]
    weights.load_matching(backbone.encoder, matching, init)


def _published(name: str) -> Iterator[str]:
    """What a tensor of an encoder may be called in a file."""
    bare = name.removeprefix("model.")  # in the package, a network of timm is its encoder's `model`
    dotted = re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", bare)  # timm's features_only flattens stages.0 to stages_0
    for plain in (name, bare, dotted):
        yield f"encoder.{plain}"
        yield plain


def _package() -> Any:
    if importlib.util.find_spec(PACKAGE) is None:
        raise ValueError(f"segmenter smp needs the package {PACKAGE}: pip install 'tag2mask[smp]'")
    return importlib.import_module(PACKAGE)
