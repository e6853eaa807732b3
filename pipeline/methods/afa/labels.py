"""Low- and high-threshold planes of one training image → the label maps that AFA's decoder and affinity learn from (section
3).

Shape letters: k classes of the image's tags, h w pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.core.contracts import Batch
from pipeline.core.labels import IGNORE
from pipeline.imaging.pseudo_labels import LabelSettings, Window, refined_labels


def classes_and_windows(batch: Batch) -> list[tuple[Tensor, Window]]:
    """A batch that is valid on one rectangle of each image → per image its classes i64[k], 0-based, on the batch's device,
    and (rows, columns) of its rectangle; empty slices where nothing is valid."""
    tags, valid = batch.on_host.tags, batch.on_host.valid
    rows, columns = valid.any(dim=2).long(), valid.any(dim=1).long()
    bounds = [tags.count_nonzero(dim=1)]
    for line in (rows, columns):  # argmax: the first of equal ones
        first, count = line.argmax(dim=1), line.sum(dim=1)
        bounds += [first, first + count]
    order = batch.tags.argsort(dim=1, descending=True, stable=True)
    return [
        (order[image, :classes], (slice(top, bottom), slice(left, right)))
        for image, (classes, top, bottom, left, right) in enumerate(torch.stack(bounds, dim=1).tolist())
    ]


def image_labels(
    pixels: Tensor, plain: Tensor | None, spread: Tensor | None, classes: Tensor, window: Window, settings: LabelSettings
) -> list[Tensor]:
    """Image f32[3,h,w] in 0..1 and planes f32[2,k+1,·,·] → label maps u8[h,w]: of the plain planes, then of the spread ones,
    as far as they are given (None: not).

    classes: i64[k] 0-based. window: the valid pixels; all others become 255. The authors refine spread planes inside the
    window alone, plain planes on the whole crop; where the window is the whole crop, both are refined in one call.
    """
    whole = (slice(0, pixels.shape[-2]), slice(0, pixels.shape[-1]))
    if spread is None or window == whole:
        return refined_labels(
            pixels, [planes for planes in (plain, spread) if planes is not None], classes, window, settings
        )
    labels = [] if plain is None else refined_labels(pixels, [plain], classes, window, settings)
    spread_labels = torch.full(pixels.shape[-2:], IGNORE, dtype=torch.uint8, device=pixels.device)
    if spread_labels[window].numel():
        cropped = pixels[(slice(None), *window)]
        whole_window = (slice(0, cropped.shape[-2]), slice(0, cropped.shape[-1]))
        spread_labels[window] = refined_labels(cropped, [spread[(..., *window)]], classes, whole_window, settings)[0]
    return [*labels, spread_labels]
