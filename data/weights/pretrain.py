"""Drawn objects of 48 invented classes → data/weights/scenes_{vit,mit,resnet}.fp16.safetensors, the demo's backbones.

Stands for pretraining on ImageNet: images of a single object in the middle, with image-level labels only. None of the six
classes of `scenes` is among them, and no mask is used. Images are tiled into mosaics of 1, 4 or 16 cells, whose classes the
network has to predict cell by cell, so that its features are local. Some cells are empty: background is a class of its own.

    python data/weights/pretrain.py --backbone vit --steps 3000        # 39 minutes on two busy cores
    python data/weights/pretrain.py --backbone mit --steps 1500 --threads 1        # 40 minutes on a busy core
    python data/weights/pretrain.py --backbone resnet --steps 1500 --threads 1     # 34 minutes on a busy core
"""

from __future__ import annotations

import logging
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.datasets.scenes import drawing
from pipeline.datasets.scenes.drawing import Canvas, Part, Points
from pipeline.training.checkpoint import save_tensors

log = logging.getLogger("pretrain")

CLASSES = 48
EMPTY = CLASSES  # class of cells without an object
SIZE = 128  # px of a mosaic
LAYOUTS = {1: 0.25, 2: 0.5, 4: 0.25}  # cells along a side → fraction of the mosaics
POOL = {1: 2500, 2: 9000, 4: 9000}  # cells along a side → images drawn
NORM_MOMENTUM = 0.01  # a batch has a single layout, a hundred batches have all
NORMS_FIXED_FROM = 0.7  # fraction of the steps after which batch norms keep their statistics
OBJECT_TOKENS = 0.25  # fraction of a cell's tokens that must be of its class
EMPTY_TOKENS = 0.15  # fraction of the tokens of a cell with an object that must be background


def body(kind: int, aspect: float, rng: np.random.Generator) -> Points:
    """Outline number `kind` of twelve, none of them an outline of `scenes`."""
    wobble = rng.uniform(0.92, 1.08)
    angle = np.arange(10) * math.pi / 5 - math.pi / 2
    ring = np.linspace(0.3, 2 * math.pi - 0.3, 24)
    w = 0.36 * wobble
    cross = (
        (-w, -0.95), (w, -0.95), (w, -w), (0.95, -w), (0.95, w), (w, w), (w, 0.95), (-w, 0.95), (-w, w), (-0.95, w),
        (-0.95, -w), (-w, -w),
    )  # fmt: skip
    outlines: list[Points] = [
        drawing.ellipse(0, 0, 0.62 * aspect * wobble, 0.92),
        drawing.polygon((-0.85, 0.8), (0.85, 0.8), (0.05, -0.95)),
        drawing.polygon((-0.9, -0.6 * aspect), (0.9, -0.6 * aspect), (0.5 * wobble, 0.75), (-0.5 * wobble, 0.75)),
        np.stack([np.where(np.arange(10) % 2, 0.48, 0.98) * f(angle) for f in (np.cos, np.sin)], axis=1),
        drawing.polygon(*cross),
        drawing.cloud(rng, 0, 0, 0.55 * aspect, 0.85, 5, 0.25),
        drawing.ellipse(0, 0, 0.92, 0.92 * aspect, 6),
        np.concatenate([drawing.dome(0, -0.1, 0.62, 0.8), drawing.polygon((0.62, 0.85 * wobble), (-0.62, 0.85 * wobble))]),
        drawing.polygon((-0.85, -0.85), (-0.2, -0.85), (-0.2, 0.2), (0.85, 0.2), (0.85, 0.85), (-0.85, 0.85)),
        np.concatenate([np.stack([0.95 * np.cos(ring), 0.95 * np.sin(ring)], 1),
                        np.stack([0.42 * np.cos(ring[::-1]), 0.42 * np.sin(ring[::-1])], 1)]),
        drawing.polygon((-0.3, -0.95), (0.3, -0.95), (0.3, 0.1), (0.8, 0.1), (0, 0.95), (-0.8, 0.1), (-0.3, 0.1)),
        drawing.polygon((-0.95, -0.1), (-0.4, -0.6), (0.1, -0.15), (0.6, -0.65), (0.95, 0.1), (0.5, 0.65), (-0.5, 0.6)),
    ]  # fmt: skip
    return outlines[kind]


def single_object(number: int, rng: np.random.Generator) -> list[Part]:
    """An object of class `number`, which fixes outline, body texture, range of hues and attached parts."""
    class_rng = np.random.default_rng([77, number])
    textures = list(drawing.TEXTURES.values())
    texture = textures[(number * 5 + number // 12) % len(textures)]
    hue, aspect = class_rng.random(), class_rng.uniform(0.75, 1.15)
    base = drawing.colour(rng, (hue - 0.08, hue + 0.08), (0.15, 0.9), (0.45, 0.98))
    parts = [Part(body(number % 12, aspect, rng), texture, base)]
    for _ in range(int(class_rng.integers(1, 4))):
        x, y, size = class_rng.uniform(-0.7, 0.7), class_rng.uniform(-0.7, 0.7), class_rng.uniform(0.16, 0.36)
        shape, part_texture = class_rng.integers(3), textures[class_rng.integers(len(textures))]
        tones = [
            np.array([46.0, 43, 50]),
            np.array([243.0, 240, 232]),
            drawing.colour(rng, (class_rng.random(), 1), (0.5, 0.9), (0.5, 0.95)),
        ]
        part_base = tones[class_rng.integers(3)]
        x, y = x + rng.normal() * 0.04, y + rng.normal() * 0.04
        for side in (1, -1) if class_rng.random() < 0.5 else (1,):
            outline = (
                drawing.ellipse(x * side, y, size, size),
                drawing.rectangle(x * side - size, y - size * 0.7, x * side + size, y + size * 0.7),
                drawing.polygon((x * side - size, y + size), (x * side + size, y + size), (x * side, y - size)),
            )[shape]
            parts.insert(0 if class_rng.random() < 0.3 else len(parts), Part(outline, part_texture, part_base))
    return parts


def draw_single(number: int, index: int, size: int) -> np.ndarray:
    """Image u8[size,size,3] RGB of an object of class `number`, or of background alone for EMPTY."""
    rng = np.random.default_rng([5, size, number, index])
    canvas = Canvas(size, drawing.ground(rng, size, str(rng.choice(sorted(drawing.GROUNDS)))))
    if number != EMPTY:
        centre = (size / 2 + rng.normal() * size * 0.1, size / 2 + rng.normal() * size * 0.1)
        canvas.paint(
            rng, single_object(number, rng), centre=centre, radius=size * rng.uniform(0.24, 0.44),
            turn=float(rng.normal() * 0.2), mirrored=bool(rng.random() < 0.5), value=1,
        )  # fmt: skip
    return canvas.finish(rng)[0]


def _draw_images(indices: range, size: int) -> np.ndarray:
    return np.stack([draw_single(label_of(index), index, size) for index in indices])


def label_of(index: int) -> int:
    """Class of image `index` of a pool: every fifth is empty, the others cycle through the classes."""
    return EMPTY if index % 5 == 0 else (index * 7) % CLASSES


def draw_pool(cells: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[n,side,side,3] of cells of SIZE / cells px, and their classes i64[n]."""
    count = POOL[cells]
    ranges = [range(start, min(count, start + 250)) for start in range(0, count, 250)]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        images = np.concatenate(list(pool.map(partial(_draw_images, size=SIZE // cells), ranges)))
    return images, np.array([label_of(index) for index in range(count)])


def mosaic(
    pool: tuple[np.ndarray, np.ndarray], cells: int, batch: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mosaics u8[batch,SIZE,SIZE,3] of images of a pool, flipped at random, and classes i64[batch,cells,cells]."""
    images, labels = pool
    indices = rng.integers(len(images), size=(batch, cells, cells))
    tiles = images[indices]
    flipped = rng.random((batch, cells, cells)) < 0.5
    tiles[flipped] = tiles[flipped][:, :, ::-1]
    side = SIZE // cells
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(batch, cells * side, cells * side, 3), labels[indices]


def cell_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Token logits f32[b,CLASSES+1,16,16] and classes of cells i64[b,n,n] → scalar.

    Multiple-instance learning: of the softmax probabilities of a cell's tokens, the largest of the cell's class and the
    largest of background must be high, and those of all other classes low.
    """
    b, channels, side, _ = logits.shape
    n = labels.shape[1]
    cell_side = side // n
    cell_area = cell_side**2
    grid = logits.softmax(1).reshape(b, channels, n, cell_side, n, cell_side)
    tokens = grid.permute(0, 2, 4, 3, 5, 1).reshape(-1, cell_area, channels)
    cell_class = labels.reshape(-1)
    of_class = tokens.gather(2, cell_class[:, None, None].expand(-1, cell_area, 1))[..., 0]
    background = tokens[..., EMPTY]
    is_object = cell_class != EMPTY
    object_score = of_class.topk(max(1, round(OBJECT_TOKENS * cell_side * cell_side)), dim=1).values.mean(1)
    background_score = background.topk(max(1, round(EMPTY_TOKENS * cell_side * cell_side)), dim=1).values.mean(1)
    allowed = torch.where(is_object, (of_class + background).mean(1), background.mean(1))
    present = object_score.clamp(min=1e-4).log() + 0.5 * background_score.clamp(min=1e-4).log()
    return (-allowed.clamp(min=1e-4).log() - is_object * present).mean()


@click.command()
@click.option("--backbone", type=click.Choice(["vit", "mit", "resnet"]), default="vit", show_default=True)
@click.option("--steps", default=3000, show_default=True)
@click.option("--batch", default=48, show_default=True)
@click.option("--lr", default=1e-3, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(backbone: str, steps: int, batch: int, lr: float, threads: int) -> None:
    """Draws the pools, trains, and writes the backbone (fp16, without head) beside this file, also every 500 steps."""
    out = Path(__file__).parent / f"scenes_{backbone}.fp16.safetensors"
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(threads)
    pools = {cells: draw_pool(cells, threads) for cells in POOL}
    log.info("pools drawn: %s", {cells: pool[0].shape for cells, pool in pools.items()})
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    net = plugins.load("nn", backbone).create(f"scenes_{backbone}", SIZE, drop_path=0.0)
    net.net.train()  # Backbone.train() keeps batch norms fixed, whose statistics are estimated here
    for module in net.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = NORM_MOMENTUM
    head = nn.Conv2d(net.dim, CLASSES + 1, 1)
    parameters = [*net.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    total = 0.0
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        if step == round(NORMS_FIXED_FROM * steps):
            net.train()  # fixed as in later use: the other weights adapt to the mean statistics of all layouts
        cells = int(rng.choice(list(LAYOUTS), p=list(LAYOUTS.values())))
        mosaics, labels = mosaic(pools[cells], cells, batch, rng)
        images = torch.from_numpy(mosaics).permute(0, 3, 1, 2).float() / 255
        images = (images * torch.from_numpy(rng.uniform(0.85, 1.15, (batch, 3, 1, 1)).astype(np.float32))).clamp(0, 1)
        loss = cell_loss(head(net(images)), torch.from_numpy(labels))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        total += loss.item()
        if (step + 1) % 50 == 0:
            log.info("step %d loss %.4f", step + 1, total / 50)
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            path = out if step + 1 == steps else out.with_name(f"{out.stem}.{step + 1}.safetensors")
            metadata = {
                "made_by": "data/weights/pretrain.py",
                "steps": str(step + 1),
                "batch": str(batch),
                "labels": "image-level",
            }
            state = net.net.state_dict().items()
            save_tensors(path, {name: v.half() if v.is_floating_point() else v for name, v in state}, metadata)


if __name__ == "__main__":
    main()
