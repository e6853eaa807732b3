"""ResNets → a feature map: timm's at stride 16, ResNet38d and the demo's at 8. f32[b,3,h,w] in 0..1 → f32[b,dim,h/s,w/s]."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import timm  # noqa: E402
from timm.models.resnet import ResNet  # noqa: E402

from pipeline.nn.resnet import resnet38d  # noqa: E402
from pipeline.nn.resnet.resnet38d import ResNet38d  # noqa: E402
from pipeline.nn.resnet.scenes_resnet import scenes_resnet  # noqa: E402

OUTPUT_STRIDE = 16  # IRN: the last stage keeps its resolution
LAYERS = ("layer1", "layer2", "layer3", "layer4")
# IRN's checkpoint has each tensor under up to three names (methods/baselines.md section 6)
STAGE = re.compile(r"^(?:backbone\.(\d)|stage(\d))\.(\d)\.(.+)$")
STAGE1 = {"0": "conv1", "1": "bn1", "4": "layer1"}  # the others hold one layer each


class Backbone(nn.Module):
    """A ResNet whose batch norms keep their pre-trained statistics (as in PSA and IRN).

    dim, stride    channels and px per cell of the last map; image sides must be multiples of stride
    dims, strides  the same of each of `feature_maps`
    splits         number of positions at which a pass can be cut: position i (from 1) lies after group i of splits + 1
                   groups, the stem being part of the first
    """

    def __init__(self, net: ResNet | ResNet38d) -> None:
        super().__init__()
        self.net = net
        self.normalise = weights.Normalise()
        if isinstance(net, ResNet38d):
            self.dims, self.strides = resnet38d.TAP_DIMS, resnet38d.TAP_STRIDES
            self.splits = len(resnet38d.GROUPS) - 1
        else:
            stages: list[dict[str, Any]] = net.feature_info
            self.dims = tuple(int(stage["num_chs"]) for stage in stages)
            stem, *layers = (int(stage["reduction"]) for stage in stages)
            self.strides = (2 * stem, *layers)  # the stem's map is taken after max-pool
            self.splits = len(LAYERS) - 1
        self.dim, self.stride = self.dims[-1], self.strides[-1]

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
        """Maps of all depths, finest first: the stem's after max-pool and those of layer1 … layer4, or ResNet38d's taps."""
        maps = self.normalise(images)
        if isinstance(self.net, ResNet38d):
            return self.net.taps(maps)
        features = [self._stem(maps)]
        for name in LAYERS:
            features.append(self.net.get_submodule(name)(features[-1]))
        return features

    def trunk(self, images: Tensor, positions: Sequence[int]) -> list[tuple[Tensor, None]]:
        """One pass → states after the groups of `positions` (1 … splits, any order), then the state after the last group.

        A state is (maps [b,·,·,·], extra tokens); the latter are a ViT's tokens that belong to no cell, None for a ResNet.
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
        if isinstance(self.net, ResNet38d):
            modules = self.net.members(range(groups))
        else:
            modules = [module for name, module in self.net.named_children() if name not in LAYERS[groups:]] if groups else []
        return [parameter for module in modules for parameter in module.parameters()]

    def _groups(self, maps: Tensor, first: int, end: int) -> Tensor:
        for number in range(first, end):
            if isinstance(self.net, ResNet38d):
                maps = self.net.group(number, maps)
            else:
                maps = self.net.get_submodule(LAYERS[number])(maps if number else self._stem(maps))
        return maps

    def _stem(self, images: Tensor) -> Tensor:
        net: Any = self.net
        return net.maxpool(net.act1(net.bn1(net.conv1(images))))


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights; image_size is not used.

    architecture: resnet38d, scenes_resnet or a ResNet of timm, at stride 16 unless another is given as in `resnet50@8`.
    ValueError where timm has no such model.
    """
    del image_size
    if architecture == "resnet38d":
        if drop_path > 0:
            raise ValueError("resnet38d has dropout of its own and no stochastic depth: set drop_path to 0 in the recipe")
        return Backbone(ResNet38d())
    if architecture == "scenes_resnet":
        return Backbone(scenes_resnet(drop_path))
    name, _, stride = architecture.partition("@")
    if not timm.is_model(name) or stride not in ("", "8", "16", "32"):
        near = ", ".join(timm.list_models("resnet*")[:8])
        raise ValueError(
            f"timm has no model {architecture!r}; there are {near} …, with @8 or @32 behind the name for "
            f"another stride than {OUTPUT_STRIDE}, and resnet38d, scenes_resnet (edit architecture in the recipe)"
        )
    try:
        net = timm.create_model(
            name,
            pretrained=False,
            num_classes=0,
            output_stride=int(stride or OUTPUT_STRIDE),
            drop_path_rate=drop_path,
        )
    except TypeError:  # other networks take no output_stride
        net = None
    if not isinstance(net, ResNet):
        raise ValueError(f"{architecture} is no ResNet; for a ViT set methods.<run>.backbone to vit in params.yaml")
    return Backbone(net)


def load_initial(backbone: Backbone, init: Path) -> None:
    """Loads weights from a local file or from timm's hub (.hub file); nothing where init is a .txt file.

    Key names are timm's, which are torchvision's, PSA's (resnet38d) or IRN's aliases. Counters of batch norms may be
    missing, as in old files: fixed norms do not read them.
    """
    tensors = weights.initial_tensors(init)
    if tensors is None:
        return
    counters = {name: v for name, v in backbone.net.state_dict().items() if name.endswith("num_batches_tracked")}
    weights.load_matching(backbone.net, counters | renamed(tensors), init)


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """IRN's key names (resnet50.*, else stage1.* … stage4.* or backbone.0.* … backbone.3.*) → timm's; others unchanged."""
    plain = {name.removeprefix("resnet50."): value for name, value in tensors.items() if name.startswith("resnet50.")}
    return plain or {_renamed(name): value for name, value in tensors.items()}


def _renamed(name: str) -> str:
    match = STAGE.match(name)
    if match is None:
        return name
    stage = int(match[2] or int(match[1]) + 1)
    return f"{STAGE1.get(match[3], match[3]) if stage == 1 else f'layer{stage}'}.{match[4]}"
