"""PAR and affinity propagation against the direct forms. Each variant runs in a process of its own.

`python -m benchmarks.affinity VARIANT` prints seconds and MiB as JSON; benchmarks/run.py compares pairs of variants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Memory, Timing, main_of, pair, photograph
from pipeline.imaging.affinity import propagate
from pipeline.imaging.par import NEIGHBOURS, pixel_adaptive_refine

NAME = "benchmarks.affinity"
DILATIONS, ITERATIONS, W1, W2 = (1, 2, 4, 8, 12, 24), 10, 0.3, 0.01
SIZE, PLANES = (188, 250), 4
GRID, RADIUS = 48, 8


def inputs() -> tuple[Tensor, Tensor]:
    """A photograph f32[1,3,h,w] in 0..1 and planes f32[1,4,h,w]."""
    torch.manual_seed(0)
    image = torch.from_numpy(photograph(0, SIZE).copy()).permute(2, 0, 1)[None].float() / 255
    return image, torch.rand(1, PLANES, *SIZE)


def shifted() -> Tensor:
    image, planes = inputs()
    return pixel_adaptive_refine(image, planes, dilations=DILATIONS, iterations=ITERATIONS, w1=W1, w2=W2)


def convolved() -> Tensor:
    """The definition: neighbours by convolutions with one-hot kernels, all of them side by side."""
    image, planes = inputs()
    kernel = torch.zeros(8, 1, 3, 3)
    for index, (dy, dx) in enumerate(NEIGHBOURS):
        kernel[index, 0, 1 + dy, 1 + dx] = 1

    def neighbours(maps: Tensor) -> Tensor:
        b, c, h, w = maps.shape
        flat = maps.reshape(b * c, 1, h, w)
        shifted_maps = [F.conv2d(F.pad(flat, (d, d, d, d), mode="replicate"), kernel, dilation=d) for d in DILATIONS]
        return torch.cat([maps.view(b, c, 8, h, w) for maps in shifted_maps], dim=2)

    image_neighbours = neighbours(image)
    deviation = image_neighbours.std(dim=2, keepdim=True)
    colour = (
        (-(((image_neighbours - image[:, :, None]).abs() / (deviation + 1e-8) / W1) ** 2))
        .mean(dim=1, keepdim=True)
        .softmax(dim=2)
    )
    distance = torch.tensor([math.hypot(dy * d, dx * d) for d in DILATIONS for dy, dx in NEIGHBOURS])
    position = (-((distance / (distance.std() + 1e-8) / W1) ** 2)).softmax(dim=0).view(1, 1, -1, 1, 1)
    weights = colour + W2 * position
    for _ in range(ITERATIONS):
        planes = (neighbours(planes) * weights).sum(dim=2)
    return planes


def grid() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(1, PLANES, GRID, GRID), torch.rand(1, GRID**2, GRID**2)


def spread(planes: Tensor, affinity: Tensor) -> Tensor:
    return propagate(planes, affinity, radius=RADIUS, power=2, eps=0.1)


def spread_whole(planes: Tensor, affinity: Tensor, near: Tensor) -> Tensor:
    """The definition, with whole matrices; the window is made beforehand."""
    weights = (affinity * near) ** 2
    weights = weights / (weights.sum(dim=1, keepdim=True) + 0.1)
    return (planes.flatten(2) @ weights).view_as(planes)


def window() -> Tensor:
    y, x = torch.arange(GRID).repeat_interleave(GRID), torch.arange(GRID).repeat(GRID)
    return ((y[:, None] - y).abs() <= RADIUS) & ((x[:, None] - x).abs() <= RADIUS)


def spreading(whole: bool) -> Callable[[], object]:
    planes, affinity = grid()
    near = window().float() if whole else torch.empty(0)
    return (lambda: spread_whole(planes, affinity, near)) if whole else (lambda: spread(planes, affinity))


VARIANTS: dict[str, Callable[[], Callable[[], object]]] = {
    "par-shifted": lambda: shifted,
    "par-convolved": lambda: convolved,
    "spread-near": lambda: spreading(whole=False),
    "spread-whole": lambda: spreading(whole=True),
}


def par(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    torch.testing.assert_close(shifted(), convolved(), atol=1e-5, rtol=0)
    return pair(NAME, "par-shifted", "par-convolved", "PAR, 4 planes, 250×188 px", 1, "images", "one-hot convolutions")


def propagation(folder: Path) -> list[Timing | Memory]:
    """The two forms must agree before they are timed."""
    del folder
    planes, affinity = grid()
    torch.testing.assert_close(spread(planes, affinity), spread_whole(planes, affinity, window().float()), atol=1e-5, rtol=0)
    return pair(NAME, "spread-near", "spread-whole", "propagation, 48 × 48 cells", 1, "steps", "whole matrices")[:1]


if __name__ == "__main__":
    main_of(VARIANTS)()
