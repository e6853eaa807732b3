"""An image → superpixels: a partition of its pixels into segments that follow its edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.core.config import AboveZero, NonNegative, Positive


@dataclass(frozen=True)
class Felzenszwalb:
    """Superpixels of Felzenszwalb and Huttenlocher (2004).

    scale     higher for larger superpixels
    sigma     px, standard deviation of the Gaussian that smooths the image first
    min_size  px, smaller superpixels are merged into a neighbour
    """

    source: Literal["felzenszwalb"]
    scale: AboveZero
    sigma: NonNegative
    min_size: Positive


@dataclass(frozen=True)
class Slic:
    """Superpixels of SLIC (Achanta et al. 2012).

    n_segments   approximate number per image
    compactness  higher for squarer superpixels
    sigma        px, standard deviation of the Gaussian that smooths the image first
    """

    source: Literal["slic"]
    n_segments: Positive
    compactness: AboveZero
    sigma: NonNegative


def superpixels(image: np.ndarray, source: Felzenszwalb | Slic) -> np.ndarray:
    """u8[h,w,3] RGB → i64[h,w], the number of each pixel's superpixel, from 0 on."""
    from skimage.segmentation import (
        felzenszwalb,
        slic,
    )  # its import takes half a second, which a file of segments does not need

    if isinstance(source, Felzenszwalb):
        return felzenszwalb(image, scale=source.scale, sigma=source.sigma, min_size=source.min_size, channel_axis=-1)
    return slic(
        image, n_segments=source.n_segments, compactness=source.compactness, sigma=source.sigma, start_label=0,
        channel_axis=-1
    )  # fmt: skip
