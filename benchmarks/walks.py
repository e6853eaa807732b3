"""The walk between edges along near pairs alone against a dense transition matrix."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.timing import Timing, best_of
from pipeline.imaging import pairs
from pipeline.imaging.affinity import edge_walk

GRID, SMALL = (94, 125), (40, 47)  # a 375×500 photograph at stride 4
RADIUS, BETA, SQUARINGS, PLANES = 5, 10, 8, 3


def inputs(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(PLANES, *size), torch.rand(size)


def transitions(edge: Tensor) -> Tensor:
    """f32[n,n], columns sum to 1."""
    numbers = torch.arange(edge.numel()).view(edge.shape)
    near = pairs.offsets(RADIUS)
    dense = torch.eye(edge.numel())
    for affinity, offset in zip(pairs.edge_affinities(edge[None], near), near, strict=True):
        anchors, partners = pairs.ends(numbers, offset)
        dense[anchors, partners] = dense[partners, anchors] = affinity[0]
    dense = dense**BETA
    return dense / dense.sum(dim=0, keepdim=True)


def squared(planes: Tensor, edge: Tensor) -> Tensor:
    """The definition: transitions squared until they are 256 steps in one."""
    steps = transitions(edge)
    for _ in range(SQUARINGS):
        steps = steps @ steps
    return ((planes * (1 - edge)).flatten(1) @ steps).view_as(planes)


def walked(planes: Tensor, edge: Tensor) -> Tensor:
    return edge_walk(planes, edge, radius=RADIUS, beta=BETA, steps=2**SQUARINGS)


def edges(folder: Path) -> list[Timing]:
    """Both forms must agree on a small map. On the large one a single squaring is timed and counted eight times: all eight
    would take a quarter of an hour on one thread."""
    del folder
    torch.set_num_threads(1)
    torch.testing.assert_close(walked(*inputs(SMALL)), squared(*inputs(SMALL)), atol=1e-4, rtol=0)
    planes, edge = inputs(GRID)
    ours = best_of(lambda: walked(planes, edge), 3)
    steps = transitions(edge)
    started = time.perf_counter()
    torch.mm(steps, steps)
    dense = SQUARINGS * (time.perf_counter() - started)
    return [Timing(f"walk between edges, {GRID[0]} × {GRID[1]} cells", "images", 1, ours, dense, "dense, 8 × one squaring")]
