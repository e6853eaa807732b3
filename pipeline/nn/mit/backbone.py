"""Mix Transformers B0-B5 → a feature map at stride 16. f32[b,3,h,w] in 0..1 → f32[b,dim,h/16,w/16]."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from pipeline.nn import family
from pipeline.nn.mit.encoder import SIZES, MixTransformer

STRIDE = 16


class Backbone(nn.Module):
    """dim: channels of the last map; dims: of all four; stride: px per cell of the last map."""

    def __init__(self, net: MixTransformer, dims: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.net, self.dims, self.dim, self.stride = net, dims, dims[-1], STRIDE
        self.normalise = family.Normalise()

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of 16 → f32[b,dim,h/16,w/16]."""
        return self.stages(images, keep_logits=0)[0][-1]

    def stages(self, images: Tensor, *, keep_logits: int) -> tuple[list[Tensor], list[Tensor]]:
        """All four maps, finest first, and the raw attention logits of the last `keep_logits` blocks; as MixTransformer."""
        return self.net(self.normalise(images), keep_logits=keep_logits)


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights; it has no position embeddings, so image_size does not matter. ValueError lists the sizes."""
    del image_size
    if architecture not in SIZES:
        raise ValueError(
            f"there is no MiT {architecture!r}; there are {', '.join(SIZES)} (edit architecture in params.yaml)"
        )
    return Backbone(MixTransformer(SIZES[architecture], drop_path), SIZES[architecture].dims)


def load_initial(backbone: Backbone, init: Path) -> None:
    """SegFormer's ImageNet weights or an AFA checkpoint (its encoder) from a local file, or none (.txt file)."""
    if init.suffix == family.SCRATCH and init.is_file():
        return
    if init.suffix == family.HUB:
        raise ValueError(f"{init}: timm's hub has no MiT; name a local file in methods.<m>.init of params.yaml")
    tensors = family.read_weights(init)
    family.load_matching(backbone.net, {name.removeprefix("encoder."): value for name, value in tensors.items()}, init)
