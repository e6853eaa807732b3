"""Propagation, affinity labels and affinity loss meet the authors' numbers, and hold on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.labels import IGNORE
from pipeline.imaging.affinity import affinity_labels, affinity_loss, propagate
from tests.shared_data import golden


def directly(planes: Tensor, affinity: Tensor, radius: int, power: float, eps: float) -> Tensor:
    """The definition, with whole matrices."""
    b, k, gh, gw = planes.shape
    y, x = torch.arange(gh).repeat_interleave(gw), torch.arange(gw).repeat(gh)
    near = ((y[:, None] - y).abs() <= radius) & ((x[:, None] - x).abs() <= radius)
    weights = (affinity * near) ** power
    weights = weights / (weights.sum(dim=1, keepdim=True) + eps)
    return (planes.reshape(b, k, -1) @ weights).view(b, k, gh, gw)


def with_softmax(cams: Tensor, tags: Tensor, level: float) -> Tensor:
    """[background, present classes] through a softmax over those planes; absent ones 0."""
    planes = torch.cat([torch.full_like(cams[:, :1], level), cams], dim=1)
    present = torch.cat([torch.ones_like(tags[:, :1]), tags], dim=1)[..., None, None] > 0
    return planes.masked_fill(~present, -torch.inf).softmax(dim=1)


@pytest.mark.parametrize("level", ["low", "high"])
def test_planes_spread_as_the_authors_spread_them(level: str) -> None:
    file = golden("afa_affinity")
    planes = with_softmax(
        torch.from_numpy(file["cams_grid"]), torch.from_numpy(file["cls_labels"]), float(file[f"bkg_{level}"])
    )
    found = propagate(planes, torch.from_numpy(file["affinity"]), radius=int(file["radius"]), power=2, eps=0.1)
    np.testing.assert_allclose(found.numpy(), file[f"propagated_{level}"], atol=1e-5, rtol=0)


def test_planes_without_background_spread_as_the_authors_spread_them() -> None:
    file = golden("afa_affinity")
    cams, affinity = torch.from_numpy(file["cams_grid"]), torch.from_numpy(file["affinity"])
    found = propagate(cams, affinity, radius=int(file["radius"]), power=2, eps=1e-4)
    np.testing.assert_allclose(found.numpy(), file["propagated_nobg_eps1em4"], atol=1e-5, rtol=0)


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
    found = propagate(planes, affinity, radius=radius, power=power, eps=0.1)
    torch.testing.assert_close(found, directly(planes, affinity, radius, power, 0.1), atol=1e-6, rtol=1e-5)
    assert (found <= planes.amax(dim=(2, 3), keepdim=True) + 1e-6).all()  # a mean, and a bit less


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
