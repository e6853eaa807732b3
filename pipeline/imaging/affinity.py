"""Pairwise affinities of grid cells: propagation, random walks, labels and a loss to learn them (AFA section 3; PSA; IRN).

Shape letters: b images, k planes, gh gw cells of the grid, n = gh * gw; cell (y, x) has number y * gw + x.
Two cells are near if they lie at most `radius` cells apart both vertically and horizontally.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.core.labels import IGNORE
from pipeline.imaging.pairs import Offset, edge_affinities, ends, offsets


def propagate(planes: Tensor, affinity: Tensor, *, radius: int, power: float, eps: float) -> Tensor:
    """planes f32[b,k,gh,gw], affinity f32[b,n,n] ≥ 0 → f32[b,k,gh,gw], one step (AFA section 3, step 4).

    The affinity of cells that are not near is taken as 0, the rest is raised to `power`, and each column divided by its sum
    + eps; then planes @ affinity. Only blocks of near grid rows are read, never the whole matrix. ValueError if the shapes
    disagree.
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
    """u8[b,gh,gw] labels → u8[b,n,n]: 1 same label, 0 different, `ignore` where either is ignored or they are not near."""
    b, gh, gw = labels.shape
    flat = labels.reshape(b, -1)
    rows, columns = _near(gh, radius, labels.device), _near(gw, radius, labels.device)
    near = (rows[:, None, :, None] & columns[None, :, None, :]).reshape(gh * gw, gh * gw)
    known = flat != ignore
    same = (flat[:, :, None] == flat[:, None, :]).to(torch.uint8)
    return same.masked_fill_(~(near & known[:, :, None] & known[:, None, :]), ignore)


def affinity_loss(affinity: Tensor, labels: Tensor) -> Tensor:
    """affinity f32[b,n,n] in 0..1, labels u8[b,n,n] of affinity_labels → half the mean of 1 - affinity over pairs labelled 1
    plus half the mean of affinity over pairs labelled 0; 1 is added to both counts, so that either may be 0 (AFA
    section 3)."""
    same, different = labels == 1, labels == 0
    return 0.5 * ((1 - affinity) * same).sum() / (same.sum() + 1) + 0.5 * (affinity * different).sum() / (
        different.sum() + 1
    )


def edge_walk(planes: Tensor, edge: Tensor, *, radius: int, beta: float, steps: int) -> Tensor:
    """planes f32[k,gh,gw], probabilities of a class boundary f32[gh,gw] → f32[k,gh,gw] after `steps` steps (IRN section
    4.3).

    As in IRN, planes are multiplied by 1 - edge first. IRN's exp_times is the binary logarithm of steps: 8 for 256.
    """
    pairs = offsets(radius)
    affinities = [affinity[0] for affinity in edge_affinities(edge[None], pairs)]
    return pair_walk(planes * (1 - edge), affinities, pairs, beta=beta, steps=steps)


def pair_walk(planes: Tensor, affinities: Sequence[Tensor], pairs: Sequence[Offset], *, beta: float, steps: int) -> Tensor:
    """planes f32[k,gh,gw] → f32[k,gh,gw] after `steps` products with the transition matrix (PSA, eq. 4).

    affinities: f32[h',w'] per offset of imaging.pairs, for both directions; each cell has 1 with itself. The transition
    matrix is affinity ** beta, each column divided by its sum. Its power would be n × n and dense, so the planes are
    multiplied step by step.
    In double precision: over 256 steps, rounding of a cell's sum adds up to 1e-4 in single.
    """
    if planes.device.type != "cpu":
        return window_walk(planes, affinities, pairs, beta=beta, steps=steps)
    weights, walked = [affinity.double().pow(beta) for affinity in affinities], planes.double()
    total = torch.ones_like(walked[:1])
    for weight, offset in zip(weights, pairs, strict=True):
        for end in ends(total, offset):
            end += weight
    for _ in range(steps):
        summed = walked.clone()
        for weight, offset in zip(weights, pairs, strict=True):
            (to_anchors, to_partners), (anchors, partners) = ends(summed, offset), ends(walked, offset)
            to_anchors.addcmul_(partners, weight)
            to_partners.addcmul_(anchors, weight)
        walked = summed / total
    return walked.to(planes.dtype)


def window_walk(planes: Tensor, affinities: Sequence[Tensor], pairs: Sequence[Offset], *, beta: float, steps: int) -> Tensor:
    """pair_walk for a GPU: three kernels a step, where offset by offset takes two for each; sums are in another order.

    Every cell has a square window of transitions, 0 for those that are not near.
    """
    reach = max(max(abs(dy), abs(dx)) for dy, dx in pairs)
    size = 2 * reach + 1
    transitions = planes.new_zeros(*planes.shape[1:], size, size, dtype=torch.float64)  # [gh,gw,·,·]: from where
    transitions[..., reach, reach] = 1
    for affinity, offset in zip(affinities, pairs, strict=True):
        weight, (dy, dx) = affinity.double().pow(beta), offset
        anchors, partners = ends(transitions.permute(2, 3, 0, 1), offset)
        anchors[reach + dy, reach + dx], partners[reach - dy, reach - dx] = weight, weight
    transitions /= transitions.sum(dim=(2, 3), keepdim=True)
    walked = planes.double()
    for _ in range(steps):
        windows = F.pad(walked, (reach,) * 4).unfold(1, size, 1).unfold(2, size, 1)  # a view
        walked = (windows * transitions).sum(dim=(3, 4))
    return walked.to(planes.dtype)


def dense_walk(planes: Tensor, affinity: Tensor, *, beta: float, steps: int) -> Tensor:
    """pair_walk for a dense affinity f32[n,n], symmetric and 1 on the diagonal: planes f32[k,gh,gw] → f32[k,gh,gw].

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
    """bool[length,length]: True where two cells of a row lie at most `radius` apart."""
    indices = torch.arange(length, device=device)
    return (indices[:, None] - indices).abs() <= radius
