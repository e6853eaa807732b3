"""Mix Transformers B0-B5 → a feature map at stride 16. f32[b,3,h,w] in 0..1 → f32[b,dim,h/16,w/16] (scenes_mit: 8)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path

from torch import Tensor, nn

from pipeline.nn import weights
from pipeline.nn.mit.encoder import SIZES, MixTransformer, Size


class Backbone(nn.Module):
    """A Mix Transformer behind ImageNet's normalisation.

    dim, dims        channels of the last map, and of all four
    stride, strides  px per cell of the last map, and of all four
    blocks, heads    attention blocks of the last stage, and heads of each
    """

    def __init__(self, net: MixTransformer, size: Size) -> None:
        super().__init__()
        self.net, self.dims, self.dim, self.stride = net, size.dims, size.dims[-1], size.stride
        self.strides = tuple(accumulate(size.strides, mul))
        self.blocks, self.heads = size.depths[-1], size.heads[-1]
        self.normalise = weights.Normalise()

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of stride → f32[b,dim,h/stride,w/stride]."""
        return self.net(self.normalise(images))[0][-1]

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """All four maps, finest first."""
        return self.net(self.normalise(images))[0]

    def stages(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """All four maps, finest first, and queries and keys [b,heads,n,width] of the last stage's blocks."""
        return self.net(self.normalise(images))


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights. image_size is not used (no position embeddings). ValueError lists the names."""
    del image_size
    if architecture not in SIZES:
        raise ValueError(f"there is no MiT {architecture!r}; there are {', '.join(SIZES)} (edit architecture in the recipe)")
    return Backbone(MixTransformer(SIZES[architecture], drop_path), SIZES[architecture])


def architecture_of(tensors: Mapping[str, Tensor]) -> str:
    """Architecture whose channels and numbers of blocks a state dict has. ValueError lists the architectures."""
    for name, size in SIZES.items():
        projections = [tensors.get(f"patch_embed{stage}.proj.weight") for stage in range(1, 5)]
        dims = tuple(0 if weight is None else len(weight) for weight in projections)
        depths = tuple(
            len({key.split(".")[1] for key in tensors if key.startswith(f"block{stage}.")}) for stage in range(1, 5)
        )
        if (dims, depths) == (size.dims, size.depths):
            return name
    raise ValueError(f"this state dict has the channels of no MiT; there are {', '.join(SIZES)}")


def load_initial(backbone: Backbone, init: Path) -> None:
    """Loads SegFormer's ImageNet weights or an AFA checkpoint's encoder from a local file; nothing for a .txt file."""
    if init.suffix == weights.SCRATCH and init.is_file():
        return
    if init.suffix == weights.HUB:
        raise ValueError(f"{init}: timm's hub has no MiT; name a local file in methods.<run>.init of params.yaml")
    tensors = weights.read_weights(init)
    weights.load_matching(backbone.net, {name.removeprefix("encoder."): value for name, value in tensors.items()}, init)
