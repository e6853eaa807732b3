"""AffinityNet and IRN: labels to learn from, networks, and score maps that walk; on 64 px toys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import refine_case as case
import torch
from torch import Tensor

from pipeline.core import config, plugins, store
from pipeline.core.contracts import Batch, Clock, ImageMaps
from pipeline.core.labels import IGNORE
from pipeline.refiners.affinitynet import refiner as affinitynet
from pipeline.refiners.irn import refiner as irn
from tests.shared_data import shared
from tests.toys import SCRATCH, learned_fit

LEARNED = ["affinitynet", "irn"]
FAMILIES = {"vit": "scenes_vit", "mit": "scenes_mit", "resnet": "resnet18"}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAG2MASK_LAUNCHER", "inline")
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.setenv("TAG2MASK_RANKS", "1")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)


def params_of(name: str, family: str = "vit") -> Any:
    return config.parse(
        plugins.load("refiners", name).FitParams, learned_fit(FAMILIES[family], case.CRF)[name], "fit_refiner.cam"
    )


def network(name: str, family: str = "vit") -> Any:
    params, backbones = params_of(name, family), plugins.load("nn", family)
    torch.manual_seed(0)
    made = plugins.load("refiners", name).Network(params.model, params.schedule, backbones)
    made.load_initial(backbones, SCRATCH)
    return made


def two_halves() -> tuple[np.ndarray, ImageMaps]:
    """A red and a green half of 64 px, and a score map that is sure of most of the left one."""
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32, 0], image[:, 32:, 1] = 220, 160
    scores = np.zeros((1, 16, 16), np.float32)
    scores[:, 2:14, 1:8] = 1
    return image, ImageMaps(np.array([4]), scores, (64, 64))


def batch(masks: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(masks), 3, 64, 64, generator=generator)
    return Batch(images, torch.zeros(len(masks), 5), masks != IGNORE, masks)


@pytest.mark.parametrize("name", LEARNED)
def test_labels_to_learn_from_are_sure_of_objects_and_of_what_is_far_from_them(name: str) -> None:
    image, maps = two_halves()
    made = plugins.load("refiners", name).training_labels(params_of(name), image, maps, 0.3)
    assert made.dtype == np.uint8 and made.shape == (64, 64)
    assert (made[24:40, 12:24] == 5).all() and (made[:, 48:] == 0).all()
    assert set(np.unique(made)) <= {0, 5, IGNORE}


@pytest.mark.parametrize("name", LEARNED)
def test_an_image_without_classes_is_background_to_learn_from(name: str) -> None:
    none = ImageMaps(np.zeros(0, np.int64), np.zeros((0, 4, 4), np.float32), (13, 9))
    made = plugins.load("refiners", name).training_labels(params_of(name), np.zeros((13, 9, 3), np.uint8), none, 0.3)
    assert made.shape == (13, 9) and not made.any()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", LEARNED)
def test_the_network_learns_on_every_backbone_family(name: str, family: str) -> None:
    net = network(name, family).train()
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[:, 16:48, 16:48] = 3
    groups = net.param_groups(net.phases()[0])
    torch.stack(list(net.losses(batch(masks), Clock(0, 0, 1)).values())).sum().backward()
    trained = [parameter for group in groups for parameter in group.parameters]
    assert trained and any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", LEARNED)
def test_a_batch_without_any_sure_pixel_has_no_loss_and_no_nan(name: str) -> None:
    net = network(name).train()
    total = torch.stack(
        list(net.losses(batch(torch.full((1, 64, 64), IGNORE, dtype=torch.uint8)), Clock(0, 0, 1)).values())
    ).sum()
    total.backward()
    assert total.item() == 0
    assert not any(p.grad is not None and p.grad.isnan().any() for p in net.parameters())


def test_irn_leaves_its_backbone_as_it_is() -> None:
    net = network("irn", "resnet").train()
    backbone = {id(p) for p in net.backbone.parameters()}
    assert not any(id(p) in backbone for group in net.param_groups(net.phases()[0]) for p in group.parameters)
    assert not any(p.requires_grad for p in net.backbone.parameters())


def test_without_its_weight_the_displacement_branch_does_not_exist() -> None:
    settings = learned_fit("scenes_vit", case.CRF)["irn"]
    settings["model"]["displacement_weight"] = 0
    params = config.parse(irn.FitParams, settings, "fit_refiner.cam")
    net = irn.Network(params.model, params.schedule, plugins.load("nn", "vit"))
    masks = torch.zeros(1, 64, 64, dtype=torch.uint8)
    assert net.displacement is None and set(net.losses(batch(masks), Clock(0, 0, 1))) == {"edges"}


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (9, 70), (300, 20)])
@pytest.mark.parametrize("name", LEARNED)
def test_any_image_size_walks_to_probabilities(name: str, size: tuple[int, int]) -> None:
    module = plugins.load("refiners", name)
    rng = np.random.default_rng(0)
    one = module.Refiner(config.parse(module.Params, case.OPTIONS[name], "options"), {}, network(name).eval())
    maps = ImageMaps(np.array([0, 2]), case.scores_of(rng, 2, size).astype(np.float32), size)
    found = one(rng.integers(0, 256, (*size, 3), dtype=np.uint8), maps, 0.4)
    assert found.shape == (3, *size)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_a_column_is_fitted_and_refined_and_twice_has_the_same_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs = []
    for ranks in ("1", "2"):
        case.build(tmp_path / ranks, refiner=name)
        monkeypatch.chdir(tmp_path / ranks)
        monkeypatch.setenv("TAG2MASK_RANKS", ranks)
        monkeypatch.setenv("TAG2MASK_WORKERS", ranks)
        case.run_well("fit_refiner", "refine")
        outs.append(case.contents(Path("out")))
        assert not any(Path(".work").iterdir())
    assert outs[0] == outs[1]
    assert store.Store(Path("out/refined"), store.REFINED)["one pixel"]["label"].shape == (1, 1)


def test_a_killed_fit_goes_on_with_its_labels_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.build(tmp_path, refiner="irn")
    case.run_well("fit_refiner")
    undisturbed = Path("out/refiner.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(irn.Network, "losses", lambda *rest: 1 / 0)
        assert case.run("fit_refiner").exit_code == 1
    kept = list(Path(".work").rglob("labels/part-*.h5"))
    written = [path.stat().st_mtime_ns for path in kept]
    assert kept
    label_part = "pipeline.jobs.fit_refiner.label_part"
    monkeypatch.setattr(label_part, lambda *rest, **named: 1 / 0)
    case.run_well("fit_refiner")
    assert Path("out/refiner.safetensors").read_bytes() == undisturbed and written


def test_augmentation_that_labels_cannot_follow_is_refused_before_any_work(tmp_path: Path) -> None:
    settings = learned_fit("scenes_vit", case.CRF)["irn"]["augment"] | {"erase": 0.5}
    case.build(tmp_path, refiner="irn", augment=settings)
    result = case.run("fit_refiner")
    assert result.exit_code == 1 and "erase 0" in result.output and not Path(".work").exists()


def test_more_widths_than_feature_maps_are_refused(tmp_path: Path) -> None:
    model = learned_fit("scenes_vit", case.CRF)["affinitynet"]["model"] | {"widths": [4] * 7}
    case.build(tmp_path, refiner="affinitynet", model=model)
    result = case.run("fit_refiner")
    assert result.exit_code == 1 and "has only 4 feature maps" in result.output


@pytest.mark.parametrize(
    ("kind", "part", "changes", "told"),
    [
        (affinitynet.Labels, {"powers": [8, 4], "crf": case.CRF}, {}, "low < high"),
        (irn.Labels, {"factors": [2, 1], "gt_prob": 0.7, "crf": case.CRF}, {}, "low < high"),
        (affinitynet.Labels, {"powers": [4], "crf": case.CRF}, {}, r"powers: got \[4\], allowed is a list \[.*, .*\]"),
        (
            irn.Labels,
            {"factors": [0.3], "gt_prob": 0.7, "crf": case.CRF},
            {},
            r"factors: got \[0.3\], allowed is a list \[.*, .*\]",
        ),
    ],
)
def test_labels_that_are_no_ordered_pair_are_refused(
    kind: Any, part: dict[str, Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(config.ParamsError, match=told):
        config.parse(kind, part | changes, "fit_refiner.cam.labels")


def published(heading: str) -> dict[str, Tensor]:
    """Keys and shapes of one published file, on no device."""
    lines = shared("methods", "baselines_state_dict.txt").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"# {heading}"))
    found = {}
    for line in lines[start + 1 :]:
        if line.startswith("# entries"):
            continue
        if line.startswith("#"):
            break
        if line:
            name, shape, _ = line.split("\t")
            found[name] = torch.empty([int(side) for side in shape.strip("()").split(",") if side.strip()], device="meta")
    return found


@pytest.mark.parametrize(("heading", "kind"), [("IRNet", irn), ("PSA ResNet38 AffinityNet", affinitynet)])
def test_the_published_networks_have_the_keys_and_shapes_that_from_official_takes(heading: str, kind: Any) -> None:
    with torch.device("meta"):
        made = kind.Network.from_official(published(heading))
    assert not made.training


def test_a_published_file_that_lacks_a_key_is_named() -> None:
    tensors = published("IRNet")
    del tensors["fc_edge6.bias"]
    with torch.device("meta"), pytest.raises(ValueError, match=r"edge\.bias is missing"):
        irn.Network.from_official(tensors)
