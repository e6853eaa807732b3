"""Pairs of near grid cells: how alike features or class boundaries make them, which pairs a label map knows, and the loss on them.

PSA (Ahn & Kwak 2018) and IRN (Ahn et al. 2019), docs/refiners.md. No n × n matrix is ever made: an offset (dy, dx) has one map of
values, over the anchors whose partner lies on the grid, too. Shape letters: b images, d channels, gh gw cells; h' w' anchors of one offset.
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
    found = [
        (dy, dx)
        for dy in range(radius)
        for dx in range(-radius + 1, radius)
        if (dy > 0 or dx > 0) and dy * dy + dx * dx < radius * radius
    ]
    return tuple(sorted(found, key=lambda offset: (offset[0] ** 2 + offset[1] ** 2, offset)))


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
    """Probabilities of a class boundary f32[b,gh,gw] → per offset f32[b,h',w']: 1 - the highest on the straight path (IRN, eq. 7).

    Only the highest cell of each path is looked up with a gradient: the paths themselves are never laid side by side.
    """
    flat = edge.flatten(1)
    cells = torch.arange(flat.shape[1], device=edge.device).view(1, *edge.shape[1:])
    found = []
    for offset in pairs:
        with torch.no_grad():
            top, where = (ends(maps, offset)[0] for maps in (edge, cells.expand(len(edge), -1, -1)))
            top, where = top.clone(), where.clone()
            for step in path(offset):
                here, number = _along(edge, offset, step), _along(cells, offset, step)
                higher = here > top
                top, where = torch.where(higher, here, top), torch.where(higher, number, where)
        found.append(1 - flat.gather(1, where.flatten(1)).view(where.shape))
    return found


@lru_cache
def path(offset: Offset) -> tuple[Offset, ...]:
    """Cells (y, x) from an anchor at (0, 0) to its partner, all that lie less than one cell from the straight line (IRN)."""
    dy, dx = offset
    return tuple(
        (y, x)
        for y in range(dy + 1)
        for x in range(min(0, dx), max(0, dx) + 1)
        if (dx * y - dy * x) ** 2 < dy * dy + dx * dx and (y, x) != (0, 0)
    )


def _along(maps: Tensor, offset: Offset, step: Offset) -> Tensor:
    """The cell at `step` from each anchor of `offset`, […,h',w']."""
    anchors = ends(maps, offset)[0]
    top, left = step[0], max(0, -offset[1]) + step[1]
    return maps[..., top : top + anchors.shape[-2], left : left + anchors.shape[-1]]


def grid_labels(low: Tensor, high: Tensor) -> Tensor:
    """Planes of grid cells f32[b,k+1,gh,gw] each, plane 0 background, as two background levels see them → labels u8[b,gh,gw].

    `high` favours the background. Where it sees a class, that class; where even `low` sees none, background; else 255, and 255
    where all planes are 0, which is off the image (PSA, section "labels").
    """
    fewer, more = high.argmax(dim=1), low.argmax(dim=1)
    labels = fewer.masked_fill(fewer == BACKGROUND, IGNORE).masked_fill(more == BACKGROUND, BACKGROUND)
    nowhere = (low.amax(dim=1) < SMALLEST) & (high.amax(dim=1) < SMALLEST)
    return labels.masked_fill(nowhere, IGNORE).to(torch.uint8)


def pooled_labels(masks: Tensor, valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Label maps of pixels u8[b,h,w] (255: unsure) → of grid cells u8[b,gh,gw]: shares of each label, then grid_labels.

    An unsure pixel is background to `high`, and some class, no matter which, to `low`. Padding (valid bool[b,h,w] false) is nothing.
    """
    found = torch.unique(masks)
    values = F.pad(found[(found != BACKGROUND) & (found != IGNORE)], (1, 0), value=BACKGROUND)  # those that occur, sorted
    unsure, place = masks == IGNORE, torch.searchsorted(values, masks.masked_fill(masks == IGNORE, BACKGROUND))
    seen = valid[:, None].float()
    high, low = (
        F.adaptive_avg_pool2d(F.one_hot(place.masked_fill(unsure, other), len(values) + 1).movedim(-1, 1) * seen, grid)
        for other in (BACKGROUND, len(values))
    )
    values = F.pad(values, (0, IGNORE + 1 - len(values)), value=IGNORE)  # 255 stays 255
    return values[grid_labels(low, high).long()]


def kinds(labels: Tensor, offset: Offset) -> tuple[Tensor, Tensor, Tensor]:
    """Labels u8[b,gh,gw] → bool[b,h',w'] each: both background, both of one class, of different labels. 255 is in none."""
    anchors, partners = ends(labels, offset)
    same, known = anchors == partners, (anchors != IGNORE) & (partners != IGNORE)
    background = anchors == BACKGROUND
    return same & background, same & ~background & known, ~same & known


def pair_loss(affinities: Iterable[Tensor], found: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Affinities in 0..1 and kinds, offset by offset → ¼ background + ¼ foreground + ½ different pairs, each the mean negative
    logarithm of what is wanted (PSA, eq. 6; IRN, eq. 8). A kind that has no pair adds nothing."""
    sums, counts = [], []
    for affinity, (background, foreground, different) in zip(affinities, found, strict=True):
        alike, apart = -(affinity + SMALLEST).log(), -(1 + SMALLEST - affinity).log()
        sums.append(torch.stack([(alike * background).sum(), (alike * foreground).sum(), (apart * different).sum()]))
        counts.append(torch.stack([background.sum(), foreground.sum(), different.sum()]))
    means = torch.stack(sums).sum(dim=0) / (torch.stack(counts).sum(dim=0) + SMALLEST)
    return means[0] / 4 + means[1] / 4 + means[2] / 2


def displacement_loss(
    displacement: Tensor, found: Sequence[tuple[Tensor, Tensor, Tensor]], pairs: Sequence[Offset]
) -> Tensor:
    """f32[b,2,gh,gw] (dy, dx) of each cell to its object's centre → scalar (IRN, eq. 5 and 6): two cells of one object differ by
    their offset, two of the background not at all; each the mean absolute error, halved."""
    of_objects, of_background = displacement.new_zeros(2), displacement.new_zeros(2)
    for offset, (background, foreground, _) in zip(pairs, found, strict=True):
        anchors, partners = ends(displacement, offset)
        moved = anchors - partners
        wanted = moved.new_tensor(offset).view(1, 2, 1, 1)
        for total, error, kind in ((of_objects, moved - wanted, foreground), (of_background, moved, background)):
            total += torch.stack([(error.abs() * kind[:, None]).sum(), 2 * kind.sum()])
    return (
        sum((total[0] / (total[1] + SMALLEST) for total in (of_objects, of_background)), start=displacement.new_zeros(()))
        / 2
    )
