"""Any timm ViT → a feature map. f32[b,3,h,w] in 0..1 → f32[b,dim,h/stride,w/stride]."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.nn import family
from pipeline.nn.torchvision_guard import mend

mend()
import timm  # noqa: E402
from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: E402

from pipeline.nn.vit import bilinear_vit, scenes_vit  # noqa: E402

OWN = {"scenes_vit": scenes_vit.scenes_vit} | bilinear_vit.named()


PAIRS = 2  # last blocks whose queries and keys `stages` gives


class Backbone(nn.Module):
    """A ViT whose patch tokens, after the final norm, are laid out as a map.

    dim     channels of the map; dims: of the maps of `stages`
    stride  px per cell; image sides must be multiples of it
    prefix  tokens before the patches (class token, registers)
    blocks, heads   of the queries and keys that `stages` gives
    """

    def __init__(self, net: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.normalise = family.Normalise(mean, std)
        self.dim = int(net.embed_dim)
        self.stride = int(net.patch_embed.patch_size[0])
        self.prefix = int(net.num_prefix_tokens)
        depth = len(net.blocks)
        self.depths = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
        self.dims = (self.dim,) * len(self.depths)
        self.blocks = min(PAIRS, depth)
        self.heads = int(getattr(net.blocks[-1].attn, "num_heads", 0))

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of stride → f32[b,dim,h/stride,w/stride]."""
        tokens = self.net.forward_features(self.normalise(images))[:, self.prefix :]
        h, w = images.shape[-2] // self.stride, images.shape[-1] // self.stride
        return tokens.transpose(1, 2).reshape(len(images), self.dim, h, w)

    def stages(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Maps after each quarter of the blocks, all at the same stride and through the final norm; and queries and keys
        [b,heads,n,width] of the last blocks, patches only. ValueError for attention that has none.

        They are caught where timm normalises them (an identity in most ViTs), so that timm's own attention runs.
        """
        caught: dict[str, list[Tensor]] = {"q_norm": [], "k_norm": []}

        def catch(name: str) -> Callable[..., None]:
            return lambda module, given, out: caught[name].append(out[:, :, self.prefix :])

        watched = self.net.blocks[-self.blocks :]
        if not all(hasattr(block.attn, name) for block in watched for name in caught):
            raise ValueError(
                f"the attention of this architecture ({type(watched[-1].attn).__name__}) shows no queries and keys; choose a "
                "DeiT, ViT or DINOv2 in train.<m>.model.architecture of params.yaml"
            )
        hooks = [getattr(block.attn, name).register_forward_hook(catch(name)) for block in watched for name in caught]
        try:
            maps = self.net.forward_intermediates(
                self.normalise(images), indices=self.depths, norm=True, intermediates_only=True
            )
        finally:
            for hook in hooks:
                hook.remove()
        return maps, list(zip(caught["q_norm"], caught["k_norm"], strict=True))


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights. ValueError names close matches where timm has no such ViT.

    image_size: px; the grid of the position embeddings, resampled at run time to any other input size.
    """
    if architecture in OWN:
        net = OWN[architecture](image_size, drop_path)
        return Backbone(net, family.IMAGENET_MEAN, family.IMAGENET_STD)
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:8]) or "see timm.list_models('*vit*')"
        raise ValueError(f"timm has no model {architecture!r}; near it: {near} (edit architecture in params.yaml)")
    try:
        net = timm.create_model(
            architecture,
            pretrained=False,
            num_classes=0,
            img_size=image_size,
            dynamic_img_size=True,
            drop_path_rate=drop_path,
        )
    except TypeError as error:  # only ViTs take these sizes
        raise ValueError(f"{architecture} is no plain ViT; for a ResNet set methods.<m>.backbone to resnet") from error
    if not hasattr(net, "num_prefix_tokens"):
        raise ValueError(f"{architecture} is no plain ViT; for a ResNet set methods.<m>.backbone to resnet")
    settings: Any = net.pretrained_cfg
    return Backbone(net, tuple(settings["mean"]), tuple(settings["std"]))


def load_initial(backbone: Backbone, init: Path) -> None:
    """Initial weights from a local file in timm's key names, from timm's hub (.hub file), or none (.txt file).

    Position embeddings of another grid are resampled (bicubic).
    """
    tensors = initial_tensors(backbone.net, backbone.prefix, init)
    if tensors is not None:
        family.load_matching(backbone.net, tensors, init)


def initial_tensors(net: Any, prefix: int, init: Path) -> dict[str, Tensor] | None:
    """The tensors of `init` for net, whose position embeddings have `prefix` tokens before the grid in the file.

    None where training starts from random weights.
    """
    if init.suffix == family.SCRATCH and init.is_file():
        return None
    if init.suffix == family.HUB and init.is_file():
        tensors = timm.create_model(family.hub_name(init), pretrained=True, num_classes=0).state_dict()
    else:
        tensors = family.read_weights(init)
    given, grid, before = tensors.get("pos_embed"), list(net.patch_embed.grid_size), 0 if net.no_embed_class else prefix
    if given is not None and given.ndim == 3 and given.shape[1] != before + grid[0] * grid[1]:
        tensors["pos_embed"] = resample_abs_pos_embed(given, grid, num_prefix_tokens=before)
    return tensors
