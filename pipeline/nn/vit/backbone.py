"""Any timm ViT → a feature map. f32[b,3,h,w] in 0..1 → f32[b,dim,h/stride,w/stride]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.nn import weights
from pipeline.nn.torchvision_guard import define_missing_operators

define_missing_operators()
import timm  # noqa: E402
from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from pipeline.nn.vit import bilinear_vit, scenes_vit  # noqa: E402

OWN_ARCHITECTURES = {"scenes_vit": scenes_vit.scenes_vit} | bilinear_vit.named()
QUERY_KEY_BLOCKS = 2  # the last ones, whose queries and keys `stages` gives


class Backbone(nn.Module):
    """A ViT whose patch tokens, after the final norm, are laid out as a map.

    dim     channels of the map; dims: of the maps of `stages` and `feature_maps`
    stride  px per cell; image sides must be multiples of it; strides: of `feature_maps`
    prefix  tokens before the patches (class token, registers)
    blocks, heads   of the queries and keys that `stages` gives
    splits  places at which a pass can be cut: place i lies after block i; 0 where timm runs the blocks in another way
    """

    def __init__(self, net: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.normalise = weights.Normalise(mean, std)
        self.dim = int(net.embed_dim)
        self.stride = int(net.patch_embed.patch_size[0])
        self.prefix = int(net.num_prefix_tokens)
        depth = len(net.blocks)
        self.depths = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
        self.dims = (self.dim,) * len(self.depths)
        self.strides = (self.stride,) * len(self.depths)
        self.splits = depth - 1 if isinstance(self.net, VisionTransformer) else 0
        self.blocks = min(QUERY_KEY_BLOCKS, depth)
        self.heads = int(getattr(net.blocks[-1].attn, "num_heads", 0))

    def forward(self, images: Tensor) -> Tensor:
        """f32[b,3,h,w] RGB in 0..1, sides multiples of stride → f32[b,dim,h/stride,w/stride]."""
        return self._as_map(self.net.forward_features(self.normalise(images)), self._grid(images))

    def feature_maps(self, images: Tensor) -> list[Tensor]:
        """Maps after each quarter of the blocks, all at the same stride and through the final norm."""
        return self.net.forward_intermediates(
            self.normalise(images), indices=self.depths, norm=True, intermediates_only=True
        )

    def trunk(self, images: Tensor, positions: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """States after the blocks of `positions` (1 … splits, any order), and the final one, normed, as the last; one pass.

        A state is the patch tokens as a map f32[b,dim,gh,gw], and the tokens before them f32[b,prefix,dim].
        """
        net, grid, states = self.net, self._grid(images), {}
        tokens = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(self.normalise(images)))))
        for number, block in enumerate(net.blocks, start=1):
            tokens = block(tokens)
            if number in positions:
                states[number] = tokens
        in_order = [*(states[position] for position in positions), net.norm(tokens)]
        return [(self._as_map(state, grid), state[:, : self.prefix]) for state in in_order]

    def rest(self, state: tuple[Tensor, Tensor], position: int) -> Tensor:
        """The blocks after `position` and the final norm, on a state after that block → f32[b,dim,gh,gw]. The state's map
        may be a cut-out, whose patches then attend to each other and to the tokens before them alone."""
        maps, prefix = state
        tokens = torch.cat([prefix, maps.flatten(2).transpose(1, 2)], dim=1)
        for block in self.net.blocks[position:]:
            tokens = block(tokens)
        return self._as_map(self.net.norm(tokens), (maps.shape[-2], maps.shape[-1]))

    def leading(self, groups: int) -> list[nn.Parameter]:
        """Parameters of the embedding and of the first `groups` blocks; of 0, none, not even the embedding's."""
        late = {id(p) for module in (*self.net.blocks[groups:], self.net.norm) for p in module.parameters()}
        return [p for p in self.net.parameters() if id(p) not in late] if groups else []

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return images.shape[-2] // self.stride, images.shape[-1] // self.stride

    def _as_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """f32[b,prefix+n,dim] → the patches as a map."""
        return tokens[:, self.prefix :].transpose(1, 2).reshape(tokens.shape[0], self.dim, *grid)

    def stages(self, images: Tensor) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Maps after each quarter of the blocks, all at the same stride and through the final norm; and queries and keys
        [b,heads,n,width] of the last blocks, patches only. ValueError for attention that has none.

        Queries and keys are recorded where timm normalises them (an identity in most ViTs), so that timm's own attention
        runs.
        """
        recorded: dict[str, list[Tensor]] = {"q_norm": [], "k_norm": []}

        def record(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: recorded[name].append(output[:, :, self.prefix :])

        last_blocks = self.net.blocks[-self.blocks :]
        if not all(hasattr(block.attn, name) for block in last_blocks for name in recorded):
            raise ValueError(
                f"the attention of this architecture ({type(last_blocks[-1].attn).__name__}) shows no queries and keys; "
                "choose a DeiT, ViT or DINOv2 in train.model.architecture of the recipe"
            )
        hooks = [getattr(block.attn, name).register_forward_hook(record(name)) for block in last_blocks for name in recorded]
        try:
            maps = self.net.forward_intermediates(
                self.normalise(images), indices=self.depths, norm=True, intermediates_only=True
            )
        finally:
            for hook in hooks:
                hook.remove()
        return maps, list(zip(recorded["q_norm"], recorded["k_norm"], strict=True))


def create(architecture: str, image_size: int, *, drop_path: float) -> Backbone:
    """A backbone with random weights. ValueError names close matches where timm has no such ViT.

    image_size: px; the grid of the position embeddings, resampled at run time to any other input size.
    """
    if architecture in OWN_ARCHITECTURES:
        net = OWN_ARCHITECTURES[architecture](image_size, drop_path)
        return Backbone(net, weights.IMAGENET_MEAN, weights.IMAGENET_STD)
    if not timm.is_model(architecture):
        similar = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:8]) or "see timm.list_models('*vit*')"
        raise ValueError(f"timm has no model {architecture!r}; near it: {similar} (edit architecture in the recipe)")
    message = f"{architecture} is no plain ViT; for a ResNet set methods.<run>.backbone to resnet in params.yaml"
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
        raise ValueError(message) from error
    if not hasattr(net, "num_prefix_tokens"):
        raise ValueError(message)
    settings: Any = net.pretrained_cfg
    return Backbone(net, tuple(settings["mean"]), tuple(settings["std"]))


def load_initial(backbone: Backbone, init: Path) -> None:
    """Initial weights from a local file in timm's key names, from timm's hub (.hub file), or none (.txt file). ValueError:
    no fit.

    Position embeddings of another grid are resampled (bicubic).
    """
    tensors = initial_tensors(backbone.net, backbone.prefix, init)
    if tensors is not None:
        weights.load_matching(backbone.net, tensors, init)


def initial_tensors(net: Any, prefix: int, init: Path) -> dict[str, Tensor] | None:
    """The tensors of `init` for net, whose position embeddings have `prefix` tokens before the grid in the file.

    None where training starts from random weights.
    """
    tensors = weights.initial_tensors(init)
    if tensors is None:
        return None
    positions, grid, before = tensors.get("pos_embed"), list(net.patch_embed.grid_size), 0 if net.no_embed_class else prefix
    if positions is not None and positions.ndim == 3 and positions.shape[1] != before + grid[0] * grid[1]:
        tensors["pos_embed"] = resample_abs_pos_embed(positions, grid, num_prefix_tokens=before)
    return tensors
