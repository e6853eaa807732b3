"""Propagation, affinity labels and affinity loss meet the authors' numbers, and hold on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.config import parse
from pipeline.core.contracts import ImageMaps
from pipeline.core.labels import IGNORE
from pipeline.imaging.affinity import affinity_labels, affinity_loss, propagate
from pipeline.imaging.par import ParSettings, refine_image
from pipeline.imaging.planes import trinary_labels
from pipeline.refiners.walk.refiner import Params, Refiner
from tests.shared_data import golden


def directly(planes: Tensor, affinity: Tensor, radius: int, power: float, eps: float) -> Tensor:
    """The definition, with whole matrices."""
    b, k, gh, gw = planes.shape
    y, x = torch.arange(gh).repeat_interleave(gw), torch.arange(gw).repeat(gh)
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    weights = (affinity * near) ** power
    weights = weights / (weights.sum(dim=1, keepdim=True) + eps)
    return (planes.reshape(b, k, -1) @ weights).view(b, k, gh, gw)


def with_softmax(cams: Tensor, tags: Tensor, threshold: float) -> Tensor:
    """[background, present classes] through a softmax over those planes; absent ones 0."""
    planes = torch.cat([torch.full_like(cams[:, :1], threshold), cams], dim=1)
    present = torch.cat([torch.ones_like(tags[:, :1]), tags], dim=1)[..., None, None] > 0
    return planes.masked_fill(~present, -torch.inf).softmax(dim=1)


@pytest.mark.parametrize("name", ["low", "high"])
def test_planes_spread_as_the_authors_spread_them(name: str) -> None:
    file = golden("afa_affinity")
    planes = with_softmax(
        torch.from_numpy(file["cams_grid"]), torch.from_numpy(file["cls_labels"]), float(file[f"bkg_{name}"])
    )
    spread = propagate(planes, torch.from_numpy(file["affinity"]), radius=int(file["radius"]), power=2, eps=0.1)
    np.testing.assert_allclose(spread.numpy(), file[f"propagated_{name}"], atol=1e-5, rtol=0)


def test_planes_without_background_spread_as_the_authors_spread_them() -> None:
    file = golden("afa_affinity")
    cams, affinity = torch.from_numpy(file["cams_grid"]), torch.from_numpy(file["affinity"])
    spread = propagate(cams, affinity, radius=int(file["radius"]), power=2, eps=1e-4)
    np.testing.assert_allclose(spread.numpy(), file["propagated_nobg_eps1em4"], atol=1e-5, rtol=0)


def test_pairs_are_labelled_and_learned_as_the_authors_do() -> None:
    file = golden("afa_affinity")
    labels = torch.from_numpy(file["label_pseudo_par"])[:, ::16, ::16]
    pairs = affinity_labels(labels, radius=int(file["radius"]))
    np.testing.assert_array_equal(pairs.numpy(), file["affinity_label"])
    assert (pairs == 1).sum() + 1 == int(file["aff_pos_count"]) and (pairs == 0).sum() + 1 == int(file["aff_neg_count"])
    affinity = torch.from_numpy(file["affinity"]).requires_grad_()
    loss = affinity_loss(affinity, pairs)
    loss.backward()
    np.testing.assert_allclose(loss.item(), file["aff_loss"], atol=1e-5)
    assert affinity.grad is not None
    np.testing.assert_allclose(affinity.grad.numpy(), file["aff_loss_grad"], atol=1e-7, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    gh=st.integers(1, 9),
    gw=st.integers(1, 9),
    radius=st.integers(0, 10),
    power=st.sampled_from([1, 2, 3]),
    k=st.integers(1, 3),
)
def test_spreading_row_by_row_is_the_product_with_the_whole_matrix(
    gh: int, gw: int, radius: int, power: int, k: int
) -> None:
    generator = torch.Generator().manual_seed(gh * 10 + gw)
    planes, affinity = torch.rand(2, k, gh, gw, generator=generator), torch.rand(2, gh * gw, gh * gw, generator=generator)
    spread = propagate(planes, affinity, radius=radius, power=power, eps=0.1)
    torch.testing.assert_close(spread, directly(planes, affinity, radius, power, 0.1), atol=1e-6, rtol=1e-5)
    assert (spread <= planes.amax(dim=(2, 3), keepdim=True) + 1e-6).all()  # a mean, and a bit less


@given(gh=st.integers(1, 6), gw=st.integers(1, 6), radius=st.integers(0, 6), seed=st.integers(0, 99))
def test_pair_labels_are_symmetric_and_ignore_what_is_far_or_unknown(gh: int, gw: int, radius: int, seed: int) -> None:
    labels = torch.from_numpy(np.random.default_rng(seed).choice([0, 1, 2, IGNORE], (1, gh, gw)).astype(np.uint8))
    pairs = affinity_labels(labels, radius=radius)[0]
    assert torch.equal(pairs, pairs.T)
    for i in range(gh * gw):
        for j in range(gh * gw):
            (yi, xi), (yj, xj) = divmod(i, gw), divmod(j, gw)
            a, b = int(labels[0, yi, xi]), int(labels[0, yj, xj])
            far = max(abs(yi - yj), abs(xi - xj)) > radius
            assert pairs[i, j] == (IGNORE if far or IGNORE in (a, b) else int(a == b))


def test_a_batch_of_one_label_or_none_at_all_has_a_finite_loss() -> None:
    affinity = torch.rand(1, 4, 4)
    for labels in (torch.zeros(1, 2, 2, dtype=torch.uint8), torch.full((1, 2, 2), IGNORE, dtype=torch.uint8)):
        assert torch.isfinite(affinity_loss(affinity, affinity_labels(labels, radius=1)))


def test_an_affinity_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="allowed is n = 6"):
        propagate(torch.rand(1, 1, 2, 3), torch.rand(1, 5, 5), radius=1, power=2, eps=0.1)


def test_spread_planes_become_the_authors_labels_after_pixel_adaptive_refinement() -> None:
    file = golden("afa_affinity")
    par = ParSettings(0.5, (1, 2, 4, 8, 12, 24), 10, 0.3, 0.01)
    for index, image in enumerate(file["images_u8"]):
        top, bottom, left, right = file["img_box_y0y1x0x1"][index]
        box = (slice(top, bottom), slice(left, right))
        labels, values = {}, np.concatenate([[0], np.flatnonzero(file["cls_labels"][index]) + 1]).astype(np.uint8)
        for name in ("low", "high"):
            spread = torch.from_numpy(file[f"propagated_{name}"][index][values])
            full = F.interpolate(spread[None], image.shape[:2], mode="bilinear", align_corners=False)[0]
            refined = torch.zeros_like(full)
            refined[:, *box] = refine_image(image[box], full[:, *box], par)
            wanted = file[f"refined_aff_cam_{name}_ds8"][index][values]
            np.testing.assert_allclose(refined[:, ::8, ::8].numpy(), wanted, atol=5e-5, rtol=0)
            labels[name] = values[refined.numpy().argmax(axis=0)]
        final = np.full(image.shape[:2], IGNORE, np.uint8)
        final[box] = trinary_labels(labels["low"], labels["high"])[box]
        assert (final == file["label_affinity_par"][index]).mean() >= 0.998


def test_a_walk_without_affinity_says_what_to_set() -> None:
    settings = {"planes": "share", "radius": 8, "power": 2.0, "eps": 0.1, "par": None}
    refiner = Refiner(parse(Params, settings, "refine.options"), {})
    maps = ImageMaps(np.array([0]), np.ones((1, 2, 2), np.float32), (8, 8))
    with pytest.raises(ValueError, match=r"keep_affinity to true in the recipe.*choose refiner par"):
        refiner(np.zeros((8, 8, 3), np.uint8), maps, 0.5)


def test_a_walk_carries_a_class_to_what_resembles_it() -> None:
    affinity = np.full((16, 16), 1e-4, np.float32)
    halves = np.arange(16) % 4 < 2  # left and right half of a grid of 4 × 4 cells
    affinity[np.ix_(halves, halves)] = affinity[np.ix_(~halves, ~halves)] = 0.1
    scores = np.zeros((1, 4, 4), np.float32)
    scores[0, 1, 0] = 1.0  # one bright cell on the left
    settings = {"planes": "share", "radius": 8, "power": 2.0, "eps": 1e-6, "par": None}
    refiner = Refiner(parse(Params, settings, "refine.weaktr.options"), {})
    walked = refiner(np.zeros((16, 16, 3), np.uint8), ImageMaps(np.array([0]), scores, (16, 16), affinity, (4, 4)), 0.05)[1]
    assert walked[:, :6].min() > 10 * walked[:, 10:].max()
