"""timm ResNets → a feature map at stride 16. f32[b,3,h,w] in 0..1 → f32[b,dim,h/16,w/16]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.nn import family
from pipeline.nn.torchvision_guard import mend

mend()
import timm  # noqa: E402

OUTPUT_STRIDE = 16  # IRN: the last stage keeps its resolution


class Backbone(nn.Module):
    """A ResNet whose batch norms keep their pre-trained statistics, as all of the field's classifiers do."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.normalise = family.Normalise()
        self.dim = int(net.num_features)
        self.stride = OUTPUT_STRIDE

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of 16 → f32[b,dim,h/16,w/16]."""
        return self.net.forward_features(self.normalise(images))


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights; image_size does not matter to a ResNet. ValueError where timm has no such model."""
    del image_size
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models("resnet*")[:8])
        raise ValueError(f"timm has no model {architecture!r}; there are {near} … (edit architecture in params.yaml)")
    net = timm.create_model(
        architecture, pretrained=False, num_classes=0, output_stride=OUTPUT_STRIDE, drop_path_rate=drop_path
    )
    return Backbone(net)


def load_initial(backbone: Backbone, init: Path) -> None:
    """Initial weights from a local file in timm's key names, from timm's hub (.hub file), or none (.txt file)."""
    if init.suffix == family.SCRATCH and init.is_file():
        return
    if init.suffix == family.HUB and init.is_file():
        tensors = timm.create_model(family.hub_name(init), pretrained=True, num_classes=0).state_dict()
    else:
        tensors = family.read_weights(init)
    family.load_matching(backbone.net, tensors, init)
