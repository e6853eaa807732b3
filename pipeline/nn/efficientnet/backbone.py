"""timm's EfficientNets and MobileNets V2 → a feature map at stride 16. f32[b,3,h,w] in 0..1 → f32[b,dim,h/s,w/s]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import timm  # noqa: E402
from timm.models.efficientnet import EfficientNet  # noqa: E402

OUTPUT_STRIDE = 16  # as of nn/resnet: the last stages keep their resolution, with dilated convolutions


class Backbone(nn.Module):
    """An EfficientNet whose batch norms keep their pre-trained statistics, as those of nn/resnet.

    dim, stride    channels and px per cell of the last map; image sides must be multiples of stride
    dims, strides  the same of each of `feature_maps`
    splits         number of positions at which a pass can be cut: position i (from 1) lies after group i of splits + 1
                   groups, which are the stages; the stem is part of the first, the last 1×1 convolution of the last
    """

    def __init__(self, net: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.normalise = weights.Normalise(mean, std)
        stages: list[dict[str, Any]] = net.feature_info
        self.taps = [int(stage["module"].rpartition(".")[2]) for stage in stages]  # groups before each change of stride
        self.dims = (*(int(stage["num_chs"]) for stage in stages[:-1]), int(net.num_features))
        self.strides = tuple(int(stage["reduction"]) for stage in stages)
        self.dim, self.stride = self.dims[-1], self.strides[-1]
        self.splits = len(self.net.blocks) - 1

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of stride → f32[b,dim,h/stride,w/stride]."""
        return self._groups(self.normalise(images), 0, self.splits + 1)

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Maps of all strides, finest first, and the last one as `forward` gives it."""
        maps, previous, features = self.normalise(images), 0, []
        for tap in self.taps:
            maps, previous = self._groups(maps, previous, tap + 1), tap + 1
            features.append(maps)
        return features

    def trunk(self, images: Tensor, positions: Sequence[int]) -> list[tuple[Tensor, None]]:
        """One pass → states after the groups of `positions` (1 … splits, any order), then the state after the last group.

        A state is (maps [b,·,·,·], None), as of a ResNet.
        """
        maps, previous, states = self.normalise(images), 0, {}
        for position in sorted({*positions, self.splits + 1}):
            maps, previous = self._groups(maps, previous, position), position
            states[position] = maps
        return [(states[position], None) for position in (*positions, self.splits + 1)]

    def rest(self, state: tuple[Tensor, None], position: int) -> Tensor:
        """The groups after `position` on a state of that position, or on a crop of one → f32[b,dim,·,·]."""
        return self._groups(state[0], position, self.splits + 1)

    def leading(self, groups: int) -> list[nn.Parameter]:
        """Parameters of the first `groups` groups."""
        if not groups:
            return []
        modules = [self.net.conv_stem, self.net.bn1, *self.net.blocks[:groups]]
        modules += [self.net.conv_head, self.net.bn2] if groups > self.splits else []
        return [parameter for module in modules for parameter in module.parameters()]

    def _groups(self, maps: Tensor, first: int, end: int) -> Tensor:
        for number in range(first, end):
            if number == 0:
                maps = self.net.bn1(self.net.conv_stem(maps))
            maps = self.net.blocks[number](maps)
            if number == self.splits:
                maps = self.net.bn2(self.net.conv_head(maps))
        return maps


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights; image_size is not used. ValueError where timm has no such network."""
    del image_size
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models("*efficientnet_lite*"))
        raise ValueError(f"timm has no model {architecture!r}; there are {near} … (edit architecture in the recipe)")
    try:
        net = timm.create_model(
            architecture, pretrained=False, num_classes=0, output_stride=OUTPUT_STRIDE, drop_path_rate=drop_path
        )
    except (TypeError, NotImplementedError):  # other networks take no output_stride
        net = None
    if not isinstance(net, EfficientNet):
        raise ValueError(
            f"{architecture} is no EfficientNet; for a ViT or a ResNet set methods.<run>.backbone to vit or resnet in "
            "params.yaml"
        )
    settings: Any = net.pretrained_cfg
    return Backbone(net, tuple(settings["mean"]), tuple(settings["std"]))


def load_initial(backbone: Backbone, init: Path) -> None:
    """Loads weights in timm's key names from a local file or from timm's hub (.hub file); nothing where init is a .txt file.

    Counters of batch norms may be missing: fixed norms do not read them.
    """
    tensors = weights.initial_tensors(init)
    if tensors is None:
        return
    counters = {name: v for name, v in backbone.net.state_dict().items() if name.endswith("num_batches_tracked")}
    weights.load_matching(backbone.net, counters | tensors, init)
