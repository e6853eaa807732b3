"""Pairs of near grid cells: their affinity by features or class boundaries, their labels, and losses on them.

PSA (Ahn & Kwak 2018) and IRN (Ahn et al. 2019), docs/refiners.md. No n × n matrix is ever made: the pairs at an offset
(dy, dx) are one map over the anchors, the cells whose partner at this offset lies on the grid. Shape letters: b images,
d channels, gh gw cells; h' w' anchors of one offset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.labels import BACKGROUND, IGNORE

Offset = tuple[int, int]
SMALLEST = 1e-5  # added in every logarithm and count (PSA, IRN)


@lru_cache
def offsets(radius: int) -> tuple[Offset, ...]:
    """(dy, dx) of all partners nearer than `radius` cells in one half plane, nearest first: each pair of cells once."""
    half_disc = [
        (dy, dx)
        for dy in range(radius)
        for dx in range(-radius + 1, radius)
        if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius
    ]
    return tuple(sorted(half_disc, key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset)))


def ends(maps: Tensor, offset: Offset) -> tuple[Tensor, Tensor]:
    """[…,gh,gw] → views […,h',w'] of the anchors and of their partners at `offset` (dy ≥ 0)."""
    dy, dx = offset
    h, w = maps.shape[-2:]
    anchors = maps[..., : max(0, h - dy), max(0, -dx) : max(0, w - max(0, dx))]
    return anchors, maps[..., dy:, max(0, dx) : max(0, w - max(0, -dx))]


def feature_affinity(features: Tensor, offset: Offset) -> Tensor:
    """f32[b,d,gh,gw] → f32[b,h',w'] in 0..1: exp of minus the mean absolute difference (PSA, eq. 1)."""
    anchors, partners = ends(features, offset)
    return torch.exp(-(anchors - partners).abs().mean(dim=1))


def edge_affinities(edge: Tensor, pairs: Sequence[Offset]) -> list[Tensor]:
    """Probabilities of a class boundary f32[b,gh,gw] → per offset f32[b,h',w']: 1 - maximum on the straight path (IRN, eq.
    7).

    Only the maximum's cell is indexed with a gradient: the cells of all paths are never stacked.
    """
    flat = edge.flatten(1)
    cells = torch.arange(flat.shape[1], device=edge.device).view(1, *edge.shape[1:])
    affinities = []
    for offset in pairs:
        with torch.no_grad():
            maximum, argmax = (ends(maps, offset)[0] for maps in (edge, cells.expand(len(edge), -1, -1)))
            maximum, argmax = maximum.clone(), argmax.clone()
            for step in path(offset):
                value, cell = _at_step(edge, offset, step), _at_step(cells, offset, step)
                higher = value > maximum
                maximum, argmax = torch.where(higher, value, maximum), torch.where(higher, cell, argmax)
        affinities.append(1 - flat.gather(1, argmax.flatten(1)).view(argmax.shape))
    return affinities


@lru_cache
def path(offset: Offset) -> tuple[Offset, ...]:
    """Cells (y, x) from an anchor at (0, 0), itself left out, to its partner, less than 1 from the straight line (IRN)."""
    dy, dx = offset
    return tuple(
        (y, x)
        for y in range(dy + 1)
        for x in range(min(0, dx), max(0, dx) + 1)
        if (dx * y - dy * x) ** 2 < dy * dy + dx * dx and (y, x) != (0, 0)
    )


def _at_step(maps: Tensor, offset: Offset, step: Offset) -> Tensor:
    """[…,gh,gw] → […,h',w']: values of the cells at `step` (y, x) from each anchor of `offset`."""
    anchors = ends(maps, offset)[0]
    top, left = step[0], max(0, -offset[1]) + step[1]
    return maps[..., top : top + anchors.shape[-2], left : left + anchors.shape[-1]]


def grid_labels(low: Tensor, high: Tensor) -> Tensor:
    """Planes f32[b,k+1,gh,gw] under a low and under a high background threshold, plane 0 background → labels u8[b,gh,gw].

    The class where `high` has one; background where `low` has background; else 255, and 255 where all planes are 0, which is
    padding (PSA, section "labels").
    """
    high_labels, low_labels = high.argmax(dim=1), low.argmax(dim=1)
    labels = high_labels.masked_fill(high_labels == BACKGROUND, IGNORE).masked_fill(low_labels == BACKGROUND, BACKGROUND)
    empty = (low.amax(dim=1) < SMALLEST) & (high.amax(dim=1) < SMALLEST)
    return labels.masked_fill(empty, IGNORE).to(torch.uint8)


def values_in(masks: Tensor) -> Tensor:
    """Label maps u8[…] → u8[k+1]: BACKGROUND and the classes that occur, ascending; the host waits for a device."""
    counts = torch.bincount(masks.flatten(), minlength=IGNORE + 1)[:IGNORE]
    counts[BACKGROUND] = 1
    return counts.nonzero().flatten().to(torch.uint8)


def pooled_labels(masks: Tensor, valid: Tensor, grid: tuple[int, int], values: Tensor) -> Tensor:
    """Label maps of pixels u8[b,h,w] (255: undecided) → of grid cells u8[b,gh,gw]: fractions per label, then grid_labels.

    An undecided pixel counts as background in `high`, and as an extra class in `low`. Padding (valid bool[b,h,w] False)
    counts as no label. values: from `values_in`.
    """
    undecided, plane = masks == IGNORE, torch.searchsorted(values, masks.masked_fill(masks == IGNORE, BACKGROUND))
    weight = valid[:, None].float()
    high, low = (
        F.adaptive_avg_pool2d(F.one_hot(plane.masked_fill(undecided, fill), len(values) + 1).movedim(-1, 1) * weight, grid)
        for fill in (BACKGROUND, len(values))
    )
    values = F.pad(values, (0, IGNORE + 1 - len(values)), value=IGNORE)  # 255 stays 255
    return values[grid_labels(low, high).long()]


def kinds(labels: Tensor, offset: Offset) -> tuple[Tensor, Tensor, Tensor]:
    """Labels u8[b,gh,gw] → bool[b,h',w'] each: both background, both the same class, different labels. No pair with 255."""
    anchors, partners = ends(labels, offset)
    same, known = anchors == partners, (anchors != IGNORE) & (partners != IGNORE)
    background = anchors == BACKGROUND
    return same & background, same & ~background & known, ~same & known


def pair_loss(affinities: Iterable[Tensor], pair_kinds: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Per offset, affinities f32[b,h',w'] in 0..1 and `kinds` → ¼ background + ¼ foreground + ½ different pairs: the mean of
    -log(a) over the first two and of -log(1 - a) over the last (PSA, eq. 6; IRN, eq. 8). A kind without pairs adds 0."""
    sums, counts = [], []
    for affinity, (background, foreground, different) in zip(affinities, pair_kinds, strict=True):
        same, unlike = -(affinity + SMALLEST).log(), -(1 + SMALLEST - affinity).log()
        sums.append(torch.stack([(same * background).sum(), (same * foreground).sum(), (unlike * different).sum()]))
        counts.append(torch.stack([background.sum(), foreground.sum(), different.sum()]))
    means = torch.stack(sums).sum(dim=0) / (torch.stack(counts).sum(dim=0) + SMALLEST)
    return means[0] / 4 + means[1] / 4 + means[2] / 2


@lru_cache(maxsize=16)
def _displacements(pairs: tuple[Offset, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """f[pairs,1,2,1,1], uploaded once for all steps."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be used in training later
        return torch.tensor(pairs, dtype=dtype, device=device).view(-1, 1, 2, 1, 1)


def displacement_loss(
    displacement: Tensor, pair_kinds: Sequence[tuple[Tensor, Tensor, Tensor]], pairs: Sequence[Offset]
) -> Tensor:
    """Displacements f32[b,2,gh,gw] (dy, dx) of each cell to its object's centre → scalar (IRN, eq. 5 and 6): half the mean
    absolute error of the pairs on an object, whose displacements differ by their offset, plus half that of the pairs on
    background, whose displacements are equal. pair_kinds: `kinds` of each offset of `pairs`."""
    object_sums, background_sums = displacement.new_zeros(2), displacement.new_zeros(2)
    targets = _displacements(tuple(pairs), displacement.dtype, displacement.device)
    for offset, target, (background, foreground, _) in zip(pairs, targets, pair_kinds, strict=True):
        anchors, partners = ends(displacement, offset)
        difference = anchors - partners
        terms = ((object_sums, difference - target, foreground), (background_sums, difference, background))
        for sums, error, kind in terms:
            sums += torch.stack([(error.abs() * kind[:, None]).sum(), 2 * kind.sum()])
    return (
        sum((sums[0] / (sums[1] + SMALLEST) for sums in (object_sums, background_sums)), start=displacement.new_zeros(()))
        / 2
    )
