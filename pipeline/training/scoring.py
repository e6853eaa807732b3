"""The weights as they are → their score on a few training images, for phases with keep_best. No mask is involved."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pipeline.core.contracts import Phase
from pipeline.core.records import sample
from pipeline.training.data import Draw, TrainingImages, seed_of
from pipeline.training.rank import Rank

SCORED_IMAGES = 512


def scored_images(images: TrainingImages) -> TrainingImages:
    """At most SCORED_IMAGES of them, fixed by their ids, not augmented: a square of the short side, placed by the id."""
    plain = replace(
        images.augment, scale_min=1.0, scale_max=1.0, area_min=None, flip=0.0, jitter=0.0, rand_augment=None, erase=0.0
    )
    return replace(images, records=sample(images.records, SCORED_IMAGES), augment=plain)


def mean_score(rank: Rank, phase: Phase, number: int, images: TrainingImages) -> float | None:
    """Trainable.score over the images of scored_images, the same in all ranks; None where nothing could be scored.

    All ranks call it, and share the images by the phase's shards. number: the phase's place in the run, from 0.
    """
    modes = [(module, module.training) for module in rank.trainable.modules()]
    rank.trainable.eval()
    scores = []
    for shard in rank.shards(phase):
        torch.manual_seed(seed_of("score", rank.seed, number, shard))
        scores.append(_shard_score(rank, phase, number, shard, images))
    for module, mode in modes:
        module.training = mode
    _, figures = rank.gather(phase, scores)
    total, count = figures[:, :2].contiguous().cpu().sum(dim=0).tolist()
    return total / count if count and math.isfinite(total) else None


@torch.no_grad()
def _shard_score(rank: Rank, phase: Phase, number: int, shard: int, images: TrainingImages) -> torch.Tensor:
    """f64[2]: the sum of scores over a shard's images, and of how many. A shard has every shards-th sub-batch."""
    size = phase.batch_size // phase.shards
    total = torch.zeros(2, dtype=torch.float64, device=rank.device)
    for start in range(shard * size, len(images), size * phase.shards):
        draws = [Draw(index, 0) for index in range(start, min(start + size, len(images)))]
        with rank.autocast():
            total += rank.trainable.score(rank.on_device(images.batch(number, draws))).double()
    return total
