"""Pixel-adaptive refinement meets the authors' numbers, and keeps to its rules on any planes and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import ImageMaps
from pipeline.core.labels import IGNORE
from pipeline.imaging import par, planes
from pipeline.refiners.par.refiner import Params, Refiner
from tests.pretend_cuda import pretended_cuda
from tests.shared_data import golden

DILATIONS = (1, 2, 4, 8, 12, 24)


def case() -> tuple[dict[str, np.ndarray], Tensor]:
    file = golden("par")
    return file, torch.from_numpy(file["image_u8"]).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("iterations", [1, 5, 10])
def test_planes_are_refined_as_the_authors_refine_them(iterations: int) -> None:
    file, image = case()
    assert tuple(file["dilations"]) == DILATIONS
    refined = par.pixel_adaptive_refine(image, torch.from_numpy(file["masks"]), dilations=DILATIONS, iterations=iterations)
    np.testing.assert_allclose(refined.numpy(), file[f"out_iter{iterations}"], atol=2e-5, rtol=0)


def test_on_cuda_the_neighbours_are_taken_at_once_and_planes_refined_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    file, image = case()
    planes, expected = torch.from_numpy(file["masks"]), file["out_iter10"]
    for stacked in (par.STACKED, 1):  # 1: plane by plane
        monkeypatch.setattr(par, "STACKED", stacked)
        with pretended_cuda() as counts:
            on_cuda = image.to("cuda"), planes.to("cuda")
            before = counts.totals()
            refined = par.pixel_adaptive_refine(*on_cuda, dilations=DILATIONS, iterations=10)
            assert counts.since(before)["waits"] == 0
            if stacked > 1:
                assert counts.since(before)["kernels"] < 80  # neighbour by neighbour: 900
            np.testing.assert_allclose(refined.cpu().numpy(), expected, atol=2e-5, rtol=0)


def test_the_weights_around_single_pixels_are_the_authors() -> None:
    file, image = case()
    points = torch.zeros(1, 3, 80, 96)
    for plane, (y, x) in enumerate(file["delta_points_yx"]):
        points[0, plane, y, x] = 1
    refined = par.pixel_adaptive_refine(image, points, dilations=DILATIONS, iterations=1)
    np.testing.assert_allclose(refined.numpy(), file["delta_out_iter1"], atol=1e-5, rtol=0)
    ones = par.pixel_adaptive_refine(image, torch.ones(1, 1, 80, 96), dilations=DILATIONS, iterations=10)
    np.testing.assert_allclose(ones.mean().item(), file["mass_of_ones_iter10"], rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(h=st.integers(1, 40), w=st.integers(1, 40), planes=st.integers(1, 4), iterations=st.integers(1, 3))
def test_each_plane_is_refined_by_itself_and_stays_within_its_range(h: int, w: int, planes: int, iterations: int) -> None:
    generator = torch.Generator().manual_seed(h * 41 + w)
    image, given_planes = torch.rand(1, 3, h, w, generator=generator), torch.rand(1, planes, h, w, generator=generator)
    refined = par.pixel_adaptive_refine(image, given_planes, dilations=(1, 2, 4), iterations=iterations)
    assert torch.isfinite(refined).all() and (refined >= 0).all()
    assert (refined <= given_planes.max() * 1.01**iterations + 1e-5).all()
    alone = par.pixel_adaptive_refine(image, given_planes[:, -1:], dilations=(1, 2, 4), iterations=iterations)
    torch.testing.assert_close(refined[:, -1:], alone, atol=1e-6, rtol=0)


def test_tiles_of_a_large_image_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    image, planes = torch.rand(1, 3, 70, 53), torch.rand(1, 2, 70, 53)
    whole = par.pixel_adaptive_refine(image, planes, dilations=(1, 2), iterations=3)
    monkeypatch.setattr(par, "TILE", 16)
    torch.testing.assert_close(par.pixel_adaptive_refine(image, planes, dilations=(1, 2), iterations=3), whole)


def test_labels_stop_at_edges_of_colour() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[..., 16:] = 0.8
    rough = torch.zeros(1, 1, 32, 32)
    rough[..., 13:] = 1  # leaks over the edge by three pixels
    refined = par.pixel_adaptive_refine(image, rough, dilations=(1, 2, 4), iterations=20)[0, 0]
    assert refined[:, :16].max() < 0.5 < refined[:, 16:].min()


def test_the_refiner_makes_the_authors_pseudo_labels() -> None:
    file = golden("afa_affinity")
    par_settings = {"scale": 0.5, "dilations": list(DILATIONS), "iterations": 10, "w1": 0.3, "w2": 0.01}
    settings = {"planes": "softmax", "par": par_settings}
    refiner = Refiner(parse(Params, settings, "refine.afa.options"), {})
    for index, image in enumerate(file["images_u8"]):
        classes = np.flatnonzero(file["cls_labels"][index])
        maps = ImageMaps(classes, file["cams_grid"][index][classes], image.shape[:2])
        low, high = (planes.labels_of(refiner(image, maps, float(file[f"bkg_{name}"])), classes) for name in ("low", "high"))
        top, left, bottom, right = file["img_box_y0y1x0x1"][index][[0, 2, 1, 3]]
        labels = np.full(image.shape[:2], IGNORE, np.uint8)
        labels[top:bottom, left:right] = planes.trinary_labels(low, high)[top:bottom, left:right]
        assert (labels == file["label_pseudo_par"][index]).mean() >= 0.998


def test_no_dilation_is_refused() -> None:
    par_settings = {"scale": 1.0, "dilations": [], "iterations": 1, "w1": 0.3, "w2": 0.01}
    with pytest.raises(ParamsError, match="at least one distance"):
        parse(Params, {"planes": "share", "par": par_settings}, "refine.cam.options")
