"""Random walks and pair labels meet the numbers of PSA and IRN, and hold on any grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.labels import IGNORE
from pipeline.imaging import pairs
from pipeline.imaging.affinity import dense_walk, edge_walk, pair_walk, window_walk
from pipeline.imaging.planes import trinary_labels
from tests.pretend_cuda import pretended_cuda
from tests.shared_data import golden

RADIUS = 5


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def in_the_order_of(given: np.ndarray) -> list[int]:
    """Place of each of the authors' offsets in ours."""
    ours = pairs.offsets(RADIUS)
    return [ours.index((int(dy), int(dx))) for dy, dx in given]


def authors_anchors(maps: Tensor, offset: tuple[int, int]) -> Tensor:
    """Of all anchors of an offset, those that the authors use for every offset: the last rows and both sides are left
    out."""
    rim = RADIUS - 1
    left = rim - max(0, -offset[1])
    right = maps.shape[-1] - (rim - max(0, offset[1]))
    return maps[..., : maps.shape[-2] - (rim - offset[0]), left:right]


def dense(affinities: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The n × n matrix that is never made elsewhere."""
    numbers = torch.arange(size[0] * size[1]).view(size)
    whole = torch.eye(numbers.numel(), dtype=affinities[0].dtype)
    for affinity, offset in zip(affinities, pairs.offsets(RADIUS), strict=True):
        anchors, partners = pairs.ends(numbers, offset)
        whole[anchors, partners] = whole[partners, anchors] = affinity
    return whole


def test_affinity_of_a_pair_is_that_of_the_authors_edge_and_path() -> None:
    file = golden("irn_walk")
    padded = F.pad(tensor(file["irn_edge"]), (RADIUS, RADIUS, 0, RADIUS), value=1.0)
    affinities = pairs.edge_affinities(padded, pairs.offsets(RADIUS))
    for row, place in enumerate(in_the_order_of(file["irn_pair_offsets_dydx"])):
        offset = pairs.offsets(RADIUS)[place]
        ours = authors_anchors(affinities[place], offset).reshape(-1)
        np.testing.assert_allclose(ours.numpy(), file["irn_pair_affinity_padded"][row], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "beta", "steps"), [("", 10, 256), ("_beta10_exp0", 10, 1), ("_beta4_exp3", 4, 8)])
def test_planes_walk_between_edges_as_the_authors_let_them(name: str, beta: int, steps: int) -> None:
    file = golden("irn_walk")
    walked = edge_walk(
        tensor(file["irn_cam"]), tensor(file["irn_edge"][0]), radius=int(file["irn_radius"]), beta=beta, steps=steps
    )
    np.testing.assert_allclose(walked.numpy(), file[f"irn_walk{name}"], atol=2e-5, rtol=0)


def test_on_cuda_a_step_takes_three_kernels() -> None:
    file = golden("irn_walk")
    with pretended_cuda() as counts:
        planes, edge = tensor(file["irn_cam"]).to("cuda"), tensor(file["irn_edge"][0]).to("cuda")
        kernels = []
        for steps in (246, 256):
            before = counts.totals()
            walked = edge_walk(planes, edge, radius=int(file["irn_radius"]), beta=10, steps=steps)
            kernels.append(counts.since(before)["kernels"])
        np.testing.assert_allclose(walked.cpu().numpy(), file["irn_walk"], atol=2e-5, rtol=0)
    assert kernels[1] - kernels[0] == 30


def test_affinity_of_features_is_that_of_the_authors() -> None:
    file = golden("irn_walk")
    features = tensor(file["psa_features"])[None]
    for row, place in enumerate(in_the_order_of(golden("psa_affinity_labels")["psa_pair_offsets_dydx"])):
        offset = pairs.offsets(RADIUS)[place]
        ours = authors_anchors(pairs.feature_affinity(features, offset), offset).reshape(-1)
        np.testing.assert_allclose(ours.numpy(), file["psa_pair_affinity"][row], atol=1e-6, rtol=0)


def test_planes_walk_along_a_whole_matrix_as_the_authors_let_them() -> None:
    file = golden("irn_walk")
    walked = dense_walk(
        tensor(file["psa_scores_grid"]),
        tensor(file["psa_affinity_dense"]),
        beta=int(file["psa_beta"]),
        steps=2 ** int(file["psa_logt"]),
    )
    np.testing.assert_allclose(walked.numpy(), file["psa_walk_grid"], atol=2e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9), st.sampled_from([1.0, 4.0, 10.0]))
def test_the_sparse_walk_is_the_dense_one(gh: int, gw: int, steps: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(gh * 10 + gw)
    planes, edge = torch.rand(2, gh, gw, generator=generator), torch.rand(gh, gw, generator=generator)
    affinities = [affinity[0] for affinity in pairs.edge_affinities(edge[None], pairs.offsets(RADIUS))]
    whole = dense_walk(planes, dense(affinities, (gh, gw)), beta=beta, steps=steps)
    for walk in (pair_walk, window_walk):
        walked = walk(planes, affinities, pairs.offsets(RADIUS), beta=beta, steps=steps)
        torch.testing.assert_close(walked, whole, atol=1e-5, rtol=1e-4)


def test_a_constant_plane_stays_where_no_edge_is() -> None:
    still = torch.full((1, 12, 17), 0.5)
    walked = edge_walk(still, torch.zeros(12, 17), radius=RADIUS, beta=10, steps=1)
    assert walked.sum() == pytest.approx(still.sum().item(), rel=0.2)
    assert walked[0, 6, 8].item() == pytest.approx(0.5, abs=1e-6)


def test_nothing_walks_across_a_closed_edge() -> None:
    edge = torch.zeros(12, 12)
    edge[:, 6] = 1
    left = torch.zeros(1, 12, 12)
    left[:, :, :6] = 1
    walked = edge_walk(left, edge, radius=RADIUS, beta=10, steps=64)
    assert walked[:, :, 7:].max() == 0 and walked[:, :, :6].min() > 0


def test_cells_of_a_low_and_a_high_background_are_labelled_as_the_authors_do() -> None:
    file = golden("psa_affinity_labels")
    rows, columns = (int(side) for side in file["psa_valid_rows_cols"])
    grids = []
    for name in ("psa_la_prob", "psa_ha_prob"):
        planes = tensor(file[name]).clone()
        planes[:, rows:], planes[:, :, columns:] = 0, 0
        grids.append(F.avg_pool2d(planes[None], 8))
    pooled = torch.cat(grids, dim=1)[0].permute(1, 2, 0)
    np.testing.assert_allclose(pooled.numpy(), file["psa_pooled"], atol=1e-6, rtol=0)
    np.testing.assert_array_equal(pairs.grid_labels(low=grids[1], high=grids[0])[0].numpy(), file["psa_label_grid"])


def test_pairs_and_their_loss_are_those_of_the_authors() -> None:
    file = golden("psa_affinity_labels")
    labels = tensor(file["psa_label_grid"])[None]
    affinity = tensor(file["psa_loss_affinity"]).requires_grad_()
    pair_kinds = []
    for row, place in enumerate(in_the_order_of(file["psa_pair_offsets_dydx"])):
        offset = pairs.offsets(RADIUS)[place]
        kinds = [authors_anchors(kind, offset).reshape(1, -1) for kind in pairs.kinds(labels, offset)]
        for name, kind in zip(("bg_pos", "fg_pos", "neg"), kinds, strict=True):
            np.testing.assert_array_equal(kind[0].numpy(), file[f"psa_{name}"][row] > 0, err_msg=name)
        pair_kinds.append((kinds[0], kinds[1], kinds[2]))
    loss = pairs.pair_loss([affinity[:, row] for row in range(affinity.shape[1])], pair_kinds)
    loss.backward()
    assert loss.item() == pytest.approx(float(file["psa_loss"]), abs=1e-5)
    assert affinity.grad is not None
    np.testing.assert_allclose(affinity.grad.numpy(), file["psa_loss_grad"], atol=1e-6, rtol=0)


def test_pixels_of_two_refined_thresholds_are_labelled_as_irn_does() -> None:
    file = golden("psa_affinity_labels")
    values = np.array([0, *file["ir_class_ids"]], np.uint8)
    high, low = values[file["ir_fg_crf_argmax"]], values[file["ir_bg_crf_argmax"]]
    np.testing.assert_array_equal(trinary_labels(low, high), file["ir_label"])


def test_cells_of_pixel_labels_keep_the_majority_and_forget_padding() -> None:
    masks = torch.zeros(1, 8, 12, dtype=torch.uint8)
    masks[:, :4, :4], masks[:, :4, 4:8], masks[:, 4:, 4:8] = 2, IGNORE, IGNORE
    masks[:, 5, 5] = 1
    valid = torch.ones(1, 8, 12, dtype=torch.bool)
    valid[:, :, 8:] = False
    values = pairs.values_in(masks)
    assert pairs.pooled_labels(masks, valid, (2, 3), values).tolist() == [[[2, IGNORE, IGNORE], [0, IGNORE, IGNORE]]]


def test_a_loss_without_any_pair_is_zero_and_has_a_gradient() -> None:
    features = torch.rand(1, 4, 6, 6, requires_grad=True)
    labels = torch.full((1, 6, 6), IGNORE, dtype=torch.uint8)
    near = pairs.offsets(3)
    loss = pairs.pair_loss(
        [pairs.feature_affinity(features, offset) for offset in near], [pairs.kinds(labels, offset) for offset in near]
    )
    loss.backward()
    assert loss.item() == 0 and features.grad is not None and not features.grad.isnan().any()


def test_the_gradient_of_an_edge_falls_on_the_highest_cell_of_the_path() -> None:
    edge = torch.tensor([[[0.1, 0.8, 0.3]]], requires_grad=True)
    affinity = pairs.edge_affinities(edge, [(0, 2)])[0]
    affinity.sum().backward()
    assert affinity.tolist() == [[[pytest.approx(0.2)]]]
    assert edge.grad is not None and edge.grad.tolist() == [[[0, -1, 0]]]


def test_displacements_to_a_common_centre_cost_nothing() -> None:
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij")
    near = pairs.offsets(3)
    labels = torch.ones(1, 6, 6, dtype=torch.uint8)
    to_centre = torch.stack([2.5 - y, 2.5 - x])[None]
    pair_kinds = [pairs.kinds(labels, offset) for offset in near]
    assert pairs.displacement_loss(to_centre, pair_kinds, near).item() == pytest.approx(0, abs=1e-6)
    assert pairs.displacement_loss(-to_centre, pair_kinds, near).item() > 0.5
