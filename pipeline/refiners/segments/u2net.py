"""U²-Net (Qin et al., Pattern Recognition 2020): an image → how much each pixel stands out, whatever its class.

Batch norms are folded into the convolutions before them, which changes nothing at inference. Shape letters: b images, c
channels, h w pixels of the network's input, H W those of the photograph.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline.imaging import planes
from pipeline.nn.weights import Normalise, load_exactly

SIDE = 320  # px of the square that the network was trained on
DEEPEST = 6  # stages
# per stage: height of its residual U-block, 0 for the one without pooling (RSU-4F), and channels inside and out
ENCODERS = {
    "u2net": ((7, 32, 64), (6, 32, 128), (5, 64, 256), (4, 128, 512), (0, 256, 512), (0, 256, 512)),
    "u2netp": ((7, 16, 64), (6, 16, 64), (5, 16, 64), (4, 16, 64), (0, 16, 64), (0, 16, 64)),
}
DECODERS = {
    "u2net": ((7, 16, 64), (6, 32, 64), (5, 64, 128), (4, 128, 256), (0, 256, 512)),
    "u2netp": ((7, 16, 64), (6, 16, 64), (5, 16, 64), (4, 16, 64), (0, 16, 64)),
}
FLAT_HEIGHT = 4  # of RSU-4F, whose dilations double where the others pool


def enlarged(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)


def halved(maps: Tensor) -> Tensor:
    return F.max_pool2d(maps, 2, ceil_mode=True)


class ResidualUBlock(nn.ModuleDict):
    """f32[b,c,h,w] → f32[b,out,h,w]: a U-Net of `height` convolutions down, whose output is added to its input's (section
    3.1). Keys are those of the published weights."""

    def __init__(self, height: int, channels: int, inside: int, out: int) -> None:
        self.flat, height = not height, height or FLAT_HEIGHT
        self.height = height

        def convolution(channels: int, out: int, dilation: int) -> nn.Conv2d:
            return nn.Conv2d(channels, out, 3, padding=dilation, dilation=dilation)

        def dilation(depth: int) -> int:
            """Only the deepest convolution of a block that pools is dilated."""
            return 2 ** (depth - 1) if self.flat else 1 + (depth == height)

        layers = {"rebnconvin": convolution(channels, out, 1)}
        for depth in range(1, height + 1):
            layers[f"rebnconv{depth}"] = convolution(out if depth == 1 else inside, inside, dilation(depth))
        for depth in range(1, height):
            layers[f"rebnconv{depth}d"] = convolution(2 * inside, out if depth == 1 else inside, dilation(depth))
        super().__init__(layers)

    def forward(self, maps: Tensor) -> Tensor:
        def layer(name: str, maps: Tensor) -> Tensor:
            return F.relu(self[f"rebnconv{name}"](maps))

        start = layer("in", maps)
        encoded = [layer("1", start)]
        for depth in range(2, self.height + 1):
            same_size = self.flat or depth == self.height
            encoded.append(layer(str(depth), encoded[-1] if same_size else halved(encoded[-1])))
        decoded = encoded.pop()
        for depth in range(self.height - 1, 0, -1):
            beside = encoded.pop()
            decoded = layer(f"{depth}d", torch.cat([enlarged(decoded, beside), beside], dim=1))
        return decoded + start


class U2Net(nn.Module):
    """f32[b,3,h,w], normalised → f32[b,1,h,w] in 0..1, the fusion of six side outputs (section 3.2)."""

    def __init__(self, architecture: str) -> None:
        super().__init__()
        channels = 3
        for depth, (height, inside, out) in enumerate(ENCODERS[architecture], start=1):
            self.add_module(f"stage{depth}", ResidualUBlock(height, channels, inside, out))
            channels = out
        below, beside = channels, [stage[2] for stage in ENCODERS[architecture]]
        self.side6 = nn.Conv2d(below, 1, 3, padding=1)
        for depth in range(DEEPEST - 1, 0, -1):
            height, inside, out = DECODERS[architecture][depth - 1]
            self.add_module(f"stage{depth}d", ResidualUBlock(height, below + beside[depth - 1], inside, out))
            self.add_module(f"side{depth}", nn.Conv2d(out, 1, 3, padding=1))
            below = out
        self.outconv = nn.Conv2d(DEEPEST, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        def layer(name: str, maps: Tensor) -> Tensor:
            return self.get_submodule(name)(maps)

        encoded = [layer("stage1", images)]
        for depth in range(2, DEEPEST + 1):
            encoded.append(layer(f"stage{depth}", halved(encoded[-1])))
        decoded = encoded.pop()
        sides = [self.side6(decoded)]
        for depth in range(DEEPEST - 1, 0, -1):
            beside = encoded.pop()
            decoded = layer(f"stage{depth}d", torch.cat([enlarged(decoded, beside), beside], dim=1))
            sides.append(layer(f"side{depth}", decoded))
        return self.outconv(torch.cat([enlarged(side, sides[-1]) for side in reversed(sides)], dim=1)).sigmoid()


def architecture_of(tensors: Mapping[str, np.ndarray]) -> str | None:
    """u2net or u2netp, by a tensor that differs between them; None for another network's weights."""
    shape = getattr(tensors.get("stage1.rebnconv1.weight"), "shape", (0,))
    return next((name for name, stages in ENCODERS.items() if stages[0][1] == shape[0]), None)


class Saliency:
    """The network as a ProposalNetwork: image u8[H,W,3] → f32[1,h,w], from 0 to 1.

    tensors: the published weights, batch norms folded. ValueError where they are another network's.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray], source: str) -> None:
        architecture = architecture_of(tensors)
        if architecture is None:
            raise ValueError(
                f"{source} does not fit: no key stage1.rebnconv1.weight of U²-Net with folded batch norms; "
                f"`python -m stages.weights check {source}` says what it is"
            )
        self.net, self.device = U2Net(architecture).eval(), "cpu"
        load_exactly(self.net, {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}, source)
        self.normalise = Normalise()

    def to(self, device: str) -> None:
        self.device = device
        self.net.to(device)
        self.normalise.to(device)

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        small = np.array(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
        pixels = torch.from_numpy(small / max(small.max(), 1.0)).permute(2, 0, 1)[None].to(self.device)
        return planes.stretched(self.net(self.normalise(pixels))[0].cpu().numpy())
