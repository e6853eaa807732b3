"""Pairwise affinities of grid cells: spreading planes along them, and learning them from label maps (AFA, section 3; PSA; IRN).

Shape letters: b images, k planes, gh gw cells of the grid, n = gh * gw; cell (y, x) has number y * gw + x.
Cells are near when they are at most `radius` cells apart both vertically and horizontally.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.core.labels import IGNORE
from pipeline.imaging.pairs import Offset, edge_affinities, ends, offsets


def propagate(planes: Tensor, affinity: Tensor, *, radius: int, power: float, eps: float) -> Tensor:
    """planes f32[b,k,gh,gw], affinity f32[b,n,n] ≥ 0 → f32[b,k,gh,gw], one step (AFA section 3, step 4).

    The affinity of cells that are not near is taken as 0, the rest is raised to `power`, and each column divided by its sum + eps;
    then planes @ affinity. Only the rows of the grid that are near each other are ever touched. ValueError if the shapes disagree.
    """
    b, k, gh, gw = planes.shape
    if affinity.shape != (b, gh * gw, gh * gw):
        raise ValueError(
            f"affinity {tuple(affinity.shape)} does not fit planes {tuple(planes.shape)}: allowed is n = {gh * gw}"
        )
    near = _near(gw, radius, planes.device).to(affinity.dtype)  # [gw,gw]
    out = torch.empty_like(planes)
    for y in range(gh):
        top, bottom = max(0, y - radius), min(gh, y + radius + 1)
        block = affinity[:, top * gw : bottom * gw, y * gw : (y + 1) * gw].view(b, bottom - top, gw, gw)
        weights = (block.pow(power) * near).view(b, -1, gw)
        out[:, :, y] = planes[:, :, top:bottom].reshape(b, k, -1) @ weights / (weights.sum(dim=1, keepdim=True) + eps)
    return out


def affinity_labels(labels: Tensor, *, radius: int, ignore: int = IGNORE) -> Tensor:
    """u8[b,gh,gw] labels → u8[b,n,n]: 1 same label, 0 different, `ignore` where either is ignored or the cells are not near."""
    b, gh, gw = labels.shape
    flat = labels.reshape(b, -1)
    rows, columns = _near(gh, radius, labels.device), _near(gw, radius, labels.device)
    near = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(gh * gw, gh * gw)
    known = flat != ignore
    same = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)
    return same.masked_fill_(~(near & known[:, :, None] & known[:, None, :]), ignore)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """affinity f32[b,n,n] in 0..1, labels u8[b,n,n] of affinity_labels → half the mean distance from 1 over same pairs plus half the
    mean over different pairs, each with one more pair in the denominator, so that no kind may be missing (AFA section 3)."""
    same, different = labels == 1, labels == 0
    return 0.5 * ((1 - affinity) * same).sum() / (same.sum() + 1) + 0.5 * (affinity * different).sum() / (
        different.sum() + 1
    )


def edge_walk(planes: Tensor, edge: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """planes f32[k,gh,gw], probabilities of a class boundary f32[gh,gw] → f32[k,gh,gw] after `steps` steps (IRN, section 4.3).

    Boundaries keep what lies on them: planes are first weighed by 1 - edge. IRN's exp_times is the logarithm of steps: 8 for 256.
    """
    pairs = offsets(radius)
    affinities = [one[0] for one in edge_affinities(edge[None], pairs)]
    return pair_walk(planes * (1 - edge), affinities, pairs, beta=beta, steps=steps)


def pair_walk(planes: Tensor, affinities: Sequence[Tensor], pairs: Sequence[Offset], *, beta: float, steps: int) -> Tensor:
    """planes f32[k,gh,gw] times `steps` times the transitions (PSA, eq. 4): affinities f32[h',w'] per offset of imaging.pairs, both
    ways, and 1 of each cell with itself, raised to beta, each column divided by its sum.

    The transitions to the power of `steps` would be n × n and dense; the planes alone are carried along instead. In double
    precision: over 256 steps, rounding of a cell's sum adds up to 1e-4 in single.
    """
    weights, walking = [affinity.double().pow(beta) for affinity in affinities], planes.double()
    total = torch.ones_like(walking[:1])
    for weight, offset in zip(weights, pairs, strict=True):
        for end in ends(total, offset):
            end += weight
    for _ in range(steps):
        walked = walking.clone()
        for weight, offset in zip(weights, pairs, strict=True):
            (to_anchors, to_partners), (anchors, partners) = ends(walked, offset), ends(walking, offset)
            to_anchors.addcmul_(partners, weight)
            to_partners.addcmul_(anchors, weight)
        walking = walked / total
    return walking.to(planes.dtype)


def dense_walk(planes: Tensor, affinity: Tensor, *, beta: float, steps: int) -> Tensor:
    """The same for a whole affinity f32[n,n] that is at hand, symmetric and 1 on the diagonal: f32[k,gh,gw] → f32[k,gh,gw].

    ValueError if the shapes disagree. n² work per step and plane; never the n³ of a squared matrix.
    """
    k, gh, gw = planes.shape
    if affinity.shape != (gh * gw, gh * gw):
        raise ValueError(f"affinity {tuple(affinity.shape)} does not fit planes {tuple(planes.shape)}: n = {gh * gw}")
    transitions = affinity.pow(beta)
    transitions = transitions / transitions.sum(dim=0, keepdim=True)
    walked = planes.reshape(k, -1)
    for _ in range(steps):
        walked = walked @ transitions
    return walked.view(k, gh, gw)


def _near(length: int, radius: int, device: torch.device) -> Tensor:
    """bool[length,length]."""
    at = torch.arange(length, device=device)
    return (at[:, None] - at).abs() <= radius
