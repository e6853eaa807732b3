"""Dense CRF (Krähenbühl & Koltun 2011) through pydensecrf: image + unary energies → probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pydensecrf.densecrf as densecrf

from pipeline.core.config import AboveZero, NonNegative, Positive

SMALLEST_PROBABILITY = 1e-5  # PSA, IRN and MCTformer clip here before the logarithm


@dataclass(frozen=True)
class CrfSettings:
    """A dense CRF with two kernels; a weight of 0 leaves its kernel out.

    iterations        of mean field
    gaussian_sxy      px, standard deviation of the kernel that sees positions alone
    gaussian_compat   Potts weight of that kernel
    bilateral_sxy     px, standard deviation in position of the kernel that sees positions and colours
    bilateral_srgb    0..255, its standard deviation in colour
    bilateral_compat  Potts weight of that kernel
    """

    iterations: Positive
    gaussian_sxy: AboveZero
    gaussian_compat: NonNegative
    bilateral_sxy: AboveZero
    bilateral_srgb: AboveZero
    bilateral_compat: NonNegative


def unary_from_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """f32[planes,h,w] in 0..1 → energies f32[planes,h*w] = -log(max(p, 1e-5)); planes need not sum to 1."""
    flat = np.ascontiguousarray(probabilities, np.float32).reshape(len(probabilities), -1)
    return -np.log(np.maximum(flat, np.float32(SMALLEST_PROBABILITY)))


def unary_from_labels(labels: np.ndarray, planes: int, *, gt_prob: float) -> np.ndarray:
    """Plane numbers u8[h,w] in 0..planes-1 → energies f32[planes,h*w]: the labelled plane has gt_prob, the others share the
    rest.

    With one plane there is nothing to share: all energies are 0.
    """
    if not 0 < gt_prob < 1:
        raise ValueError(f"gt_prob {gt_prob}: allowed is between 0 and 1, both excluded")
    if planes == 1:
        return np.zeros((1, labels.size), np.float32)
    energy = np.full((planes, labels.size), -np.log((1 - gt_prob) / (planes - 1)), np.float32)
    energy[labels.ravel(), np.arange(labels.size)] = -np.log(gt_prob)
    return energy


def dense_crf(image: np.ndarray, unary: np.ndarray, settings: CrfSettings) -> np.ndarray:
    """image u8[h,w,3] RGB, unary f32[planes,h*w] → probabilities f32[planes,h,w]. A single plane is certain everywhere."""
    h, w = image.shape[:2]
    planes = len(unary)
    if planes == 1:
        return np.ones((1, h, w), np.float32)
    field = densecrf.DenseCRF2D(w, h, planes)
    field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
    if settings.gaussian_compat:
        field.addPairwiseGaussian(sxy=settings.gaussian_sxy, compat=settings.gaussian_compat)
    if settings.bilateral_compat:
        field.addPairwiseBilateral(
            sxy=settings.bilateral_sxy,
            srgb=settings.bilateral_srgb,
            rgbim=np.require(image, np.uint8, ["C", "W"]),  # decoded images are read-only, which the binding refuses
            compat=settings.bilateral_compat,
        )
    return np.array(field.inference(settings.iterations), np.float32).reshape(planes, h, w)
