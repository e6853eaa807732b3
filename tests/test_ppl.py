"""PPL: patches run alone through shared blocks, in phases or all at once, and are put together to one class map."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.core import plugins
from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Extract
from pipeline.jobs import score_maps
from pipeline.methods.ppl import method as ppl
from pipeline.training.checkpoint import save_tensors
from pipeline.training.settings import Schedule
from tests.test_resnet import published
from tests.toys import SCRATCH, toy_recipe

LABELS = LabelSpace(("disc", "square", "star"))
SCHEDULE = Schedule(6, 0, 4, 2, 1e-2, 0.0, "adamw", "poly", 0, 0.0)
BACKBONES = [("resnet", "scenes_resnet"), ("resnet", "resnet18@8"), ("vit", "scenes_vit")]
BOTH = ppl.Options(1, "both")
Setting = dict[str, Any]
EXPLICIT: Setting = {"mode": "explicit", "positions": [1, 2, 3]}


def made(
    backbone: str = "resnet", architecture: str = "scenes_resnet", labels: LabelSpace = LABELS, **changes: Any
) -> ppl.Method:
    """A method in eval mode whose residual branches all count, cut after group 2 unless changed."""
    model = toy_recipe("ppl")["train"]["model"]
    model |= {"architecture": architecture, "mode": "single", "positions": [2], "freeze_norms": False, **changes}
    torch.manual_seed(0)
    method = ppl.Method(labels, parse(ppl.Params, model, "model"), SCHEDULE, plugins.load("nn", backbone)).eval()
    for module in method.backbone.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.is_meta:  # timm starts residual branches at 0
            nn.init.uniform_(module.weight, 0.5, 1.0)
    for block in getattr(method.backbone.net, "blocks", ()):  # a ViT's start is too near to the identity
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.1)
    return method


def batch(size: int = 64) -> Batch:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return Batch(images, torch.tensor([[1.0, 0, 0], [0, 1, 1]]), torch.ones(2, size, size, dtype=torch.bool), None)


def branches(method: ppl.Method, images: Tensor, shifts: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return method.branch_maps(images, method.params.positions, shifts)


def share_classifier(method: ppl.Method) -> ppl.Method:
    """Gives all branches the global path's classifier, so that only their features can differ."""
    for classifier in method.fc8:
        classifier.load_state_dict(method.fc8[0].state_dict())
    return method


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
@pytest.mark.parametrize("position", [1, 2, 3])
@pytest.mark.parametrize("grid", [2, 4])
def test_folding_patches_into_the_batch_equals_looping_over_them(
    backbone: str, architecture: str, position: int, grid: int
) -> None:
    method, images = made(backbone, architecture, positions=[position], grid=grid), torch.rand(2, 3, 64, 64)
    patched = branches(method, images)[1]
    with torch.no_grad():
        (maps, before), _ = method.backbone.trunk(images, [position])
        side, cells = maps.shape[-1] // grid, 8 // grid
        for y, x in product(range(grid), repeat=2):
            patch = maps[..., y * side : (y + 1) * side, x * side : (x + 1) * side]
            alone = method.fc8[1](method.backbone.rest((patch, before), position))
            part = patched[..., y * cells : (y + 1) * cells, x * cells : (x + 1) * cells]
            torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
@pytest.mark.parametrize("position", [1, 2, 3])
def test_one_patch_is_the_global_path_and_four_are_not(backbone: str, architecture: str, position: int) -> None:
    images = torch.rand(2, 3, 64, 96)
    for grid, same in ((1, True), (2, False)):
        whole, patched = branches(share_classifier(made(backbone, architecture, positions=[position], grid=grid)), images)
        assert torch.equal(whole, patched) is same
    assert (whole - patched).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
@pytest.mark.parametrize("position", [1, 3])
def test_a_patch_does_not_depend_on_another_patch(
    backbone: str, architecture: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, images = made(backbone, architecture, positions=[position]), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (maps, tokens), last = method.backbone.trunk(images, [position])
    changed = maps.clone()
    changed[..., maps.shape[-1] // 2 :, : maps.shape[-1] // 2] += 5 * torch.rand(1)  # the patch at the lower left
    plain = branches(method, images)[1]
    monkeypatch.setattr(method.backbone, "trunk", lambda images, positions: [(changed, tokens), last])
    disturbed = branches(method, images)[1]
    assert not torch.equal(plain[..., 4:, :4], disturbed[..., 4:, :4])
    for rows, columns in ((slice(0, 4), slice(0, 8)), (slice(4, 8), slice(4, 8))):
        assert torch.equal(plain[..., rows, columns], disturbed[..., rows, columns])
    with torch.no_grad():
        whole = [method.backbone.rest((state, tokens), position) for state in (maps, changed)]
    assert not torch.equal(whole[0][..., :4, :4], whole[1][..., :4, :4])  # unlike the global path


@pytest.mark.parametrize("changes", [{"positions": [1]}, EXPLICIT], ids=["single", "explicit"])
def test_the_sum_of_the_branches_is_a_convolution_of_their_concatenation(changes: Setting) -> None:
    method, images = made(**changes), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        *states, (last, _) = method.backbone.trunk(images, method.params.positions)
        features = [last]
        for position, (maps, _) in zip(method.params.positions, states, strict=True):
            halves = [half.chunk(2, dim=3) for half in maps.chunk(2, dim=2)]
            done = [[method.backbone.rest((patch, None), position) for patch in row] for row in halves]
            features.append(torch.cat([torch.cat(row, dim=3) for row in done], dim=2))
        weight = torch.cat([classifier.get_parameter("weight") for classifier in method.fc8], dim=1)
        direct = nn.functional.conv2d(torch.cat(features, dim=1), weight)
    torch.testing.assert_close(method.inspect(images)["class_map"], direct, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(method.score_maps(images, BOTH).scores, direct.relu(), atol=1e-6, rtol=1e-4)


def gradients(method: ppl.Method, branch: int) -> tuple[set[int], set[int]]:
    """Parameters of the backbone that learn from one branch alone, and all of them."""
    for number, classifier in enumerate(method.fc8):
        if number != branch:
            nn.init.zeros_(classifier.get_parameter("weight"))
    method.train().losses(batch(), Clock(0, 0, 1))["classification"].backward()
    parameters = list(method.backbone.net.parameters())
    return {id(p) for p in parameters if p.grad is not None and p.grad.abs().sum() > 0}, {id(p) for p in parameters}


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
@pytest.mark.parametrize("branch", [1, 2, 3])
def test_in_explicit_mode_no_gradient_of_a_patch_path_goes_below_its_cut(
    backbone: str, architecture: str, branch: int
) -> None:
    method = made(backbone, architecture, **EXPLICIT)
    below = {id(p) for p in method.backbone.leading(branch)}
    learning, everything = gradients(method, branch)
    assert not learning & below and len(learning) > 0.8 * len(everything - below)


@pytest.mark.parametrize(("changes", "branch"), [(EXPLICIT, 0), ({"positions": [2]}, 1)], ids=["global", "single"])
def test_the_global_path_and_a_single_patch_path_teach_all_blocks(changes: Setting, branch: int) -> None:
    method = made(**changes)
    learning, everything = gradients(method, branch)
    assert learning == everything


def test_a_progressive_run_has_a_phase_per_position_each_from_the_weights_of_the_one_before() -> None:
    method = made(mode="progressive", positions=[1, 2, 3], later_epochs_factor=0.5, later_lr_factor=0.1)
    phases = method.phases()
    assert [phase.name for phase in phases] == ["after_1", "after_2", "after_3"]
    assert [phase.epochs for phase in phases] == [6, 3, 3]
    assert [phase.lr for phase in phases] == pytest.approx([1e-2, 1e-3, 1e-3])
    assert all(phase.restart == () for phase in phases)
    again = made(mode="progressive", positions=[1, 2], reset_classifier=True).phases()
    assert [phase.restart for phase in again] == [(), ("fc8.",)]
    assert all(name.startswith(("fc8.", "backbone.")) for name in method.state_dict())


@pytest.mark.parametrize("mode", ["plain", "single", "explicit"])
def test_the_other_modes_have_one_phase(mode: str) -> None:
    positions = {"plain": [], "single": [2], "explicit": [3, 1]}[mode]
    assert [phase.name for phase in made(mode=mode, positions=positions).phases()] == [mode]


def recorded_passes(method: ppl.Method, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """A list that gets (position, patches in the batch) of every later pass through the last blocks."""
    passes: list[tuple[int, int]] = []
    original = method.backbone.rest

    def rest(state: Any, position: int) -> Tensor:
        passes.append((position, len(state[0])))
        return original(state, position)

    monkeypatch.setattr(method.backbone, "rest", rest)
    return passes


def test_only_the_position_of_the_phase_runs_and_all_patches_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(mode="progressive", positions=[3, 1])
    passes = recorded_passes(method, monkeypatch)
    for phase in (0, 1):
        method.losses(batch(), Clock(phase, 0, 1))
    assert passes == [(3, 8), (1, 8)]
    method.score_maps(batch().images, BOTH)
    assert passes[2:] == [(1, 8)]  # the score maps are the last phase's


def test_a_plain_network_has_no_patch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(mode="plain", positions=[])
    passes = recorded_passes(method, monkeypatch)
    scores = method.score_maps(batch().images, BOTH).scores
    assert passes == [] and len(method.fc8) == 1
    torch.testing.assert_close(scores, method.fc8[0](method.backbone(batch().images)).relu())
    with pytest.raises(ValueError, match=r"paths to both in the recipe"):
        method.score_maps(batch().images, ppl.Options(1, "patch"))


@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    patches=st.integers(1, 5),
    shift=st.sampled_from([0, 1 / 4, 1 / 3, 1 / 2, 3 / 4]),
)
def test_every_cell_lies_in_exactly_one_patch(grid: tuple[int, int], patches: int, shift: float) -> None:
    count = torch.zeros(grid)
    boxes = ppl.patch_boxes(grid, patches, shift)
    for (h, w), corners in boxes.items():
        for y, x in corners:
            assert h >= 1 and w >= 1 and y + h <= grid[0] and x + w <= grid[1]
            count[y : y + h, x : x + w] += 1
    assert (count == 1).all()
    if shift == 0:
        assert len(boxes) <= 4 and max(max(size) for size in boxes) <= -(-max(grid) // patches)
        assert len(boxes) == 1 or any(side % patches for side in grid)


@pytest.mark.parametrize(("backbone", "architecture"), BACKBONES)
@pytest.mark.parametrize("size", [(8, 8), (8, 40), (56, 72)])
def test_grids_that_do_not_divide_have_whole_maps(backbone: str, architecture: str, size: tuple[int, int]) -> None:
    method = made(backbone, architecture, **EXPLICIT)
    for shifts in (1, 3):
        scores = method.score_maps(torch.rand(2, 3, *size), ppl.Options(shifts, "both")).scores
        assert scores.shape == (2, 3, size[0] // 8, size[1] // 8) and torch.isfinite(scores).all()
    total = method.losses(batch(size[0]), Clock(0, 0, 1))["classification"]
    total.backward()
    assert torch.isfinite(total)


def test_images_of_any_size_get_score_maps() -> None:
    image = np.random.default_rng(0).integers(0, 255, (61, 83, 3), dtype=np.uint8)
    settings = Extract((1.0, 1.5), None, True, "irn", 4, 8, 0.5, False, "fp32", 64, "gzip", 0, {})
    record = ImageRecord("x", "x.png", (61, 83), "train", (0, 2), b"")
    fields = score_maps.score([image], [record], made(), ppl.Options(2, "both"), settings, "cpu")[0]
    assert fields["scores"].shape == (2, 16, 21)


@pytest.mark.parametrize("position", [1, 2, 3])
def test_shifted_grids_flatten_the_cross_on_an_image_of_one_colour(position: int) -> None:
    method, image = share_classifier(made(positions=[position])), torch.full((1, 3, 128, 128), 0.7)
    seams = []
    for shifts in (1, 2, 4):
        whole, patched = branches(method, image, shifts)
        seams.append((patched - whole).abs().mean(dim=1).max().item())
    assert max(seams[1:]) < 0.9 * seams[0]


def test_the_score_map_is_made_of_the_chosen_paths() -> None:
    method, images = made(**EXPLICIT), torch.rand(2, 3, 64, 64)
    whole, *patched = branches(method, images)
    maps = {paths: method.score_maps(images, ppl.Options(1, paths)) for paths in ("both", "global", "patch")}
    torch.testing.assert_close(maps["global"].scores, whole.relu())
    torch.testing.assert_close(maps["patch"].scores, torch.stack(patched).sum(dim=0).relu())
    torch.testing.assert_close(maps["both"].scores, (whole + torch.stack(patched).sum(dim=0)).relu())
    assert torch.equal(maps["both"].tag_logits, maps["global"].tag_logits)  # tag logits are of all paths


def test_inspection_shows_every_branch() -> None:
    tensors = made(**EXPLICIT).inspect(torch.rand(1, 3, 64, 64))
    assert list(tensors) == ["class_map", "global", "after_1", "after_2", "after_3", "logits", "classifier_norms"]
    summed = torch.stack([tensors[name] for name in list(tensors)[1:5]]).sum(dim=0)
    torch.testing.assert_close(tensors["class_map"], summed)
    assert tensors["classifier_norms"].shape == (1, 4)


def test_channels_are_dropped_per_image_and_not_per_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    method = made(positions=[1], dropout=0.5).train()
    monkeypatch.setattr(method.backbone, "rest", lambda state, position: torch.ones(len(state[0]), 128, 4, 4))
    first, second = branches(method, torch.rand(2, 3, 64, 64))[1]
    for maps in (first, second):
        torch.testing.assert_close(maps, maps[:, :1, :1].expand(-1, 8, 8))
    assert not torch.allclose(first, second)
    eighth = branches(method.eval(), torch.rand(2, 3, 64, 64))[1]
    torch.testing.assert_close(eighth[0], eighth[1])


def test_frozen_groups_and_norms_learn_nothing() -> None:
    method = made(frozen_groups=2, freeze_norms=True)
    trained = {id(p) for group in method.param_groups(method.phases()[0]) for p in group.parameters}
    norms = {id(p) for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    fixed = norms | {id(p) for p in method.backbone.leading(2)}
    assert trained == {id(p) for p in method.parameters()} - fixed and len(fixed) < len(list(method.parameters()))
    method.losses(batch(), Clock(0, 0, 1))["classification"].backward()
    assert all((p.grad is None) is (id(p) in fixed) for p in method.parameters())
    alone = made(backbone_lr_factor=0)
    assert [p for g in alone.param_groups(alone.phases()[0]) for p in g.parameters] == list(alone.fc8.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "plain", "positions": [1]}, "plain takes none"),
        ({"mode": "single", "positions": [1, 2]}, "single one"),
        ({"mode": "progressive", "positions": []}, "one or more"),
        ({"mode": "explicit", "positions": [2, 2]}, "names a position twice"),
        ({"positions": [0]}, "positions"),
        ({"positions": [4]}, r"go to 3, not to 4 \(edit the recipe\)"),
        ({"frozen_groups": 5}, "go to 3, not to 5"),
    ],
)
def test_modes_and_positions_that_do_not_fit_are_refused(changes: Setting, message: str) -> None:
    with pytest.raises((ParamsError, ValueError), match=message):
        made(**changes)


def test_a_model_of_ours_and_a_bare_backbone_start_another_run(tmp_path: Path) -> None:
    first, second = made(mode="progressive", positions=[1, 2]), made(positions=[3])
    save_tensors(tmp_path / "model.safetensors", first.state_dict(), {})
    nn.init.zeros_(second.fc8[1].get_parameter("weight"))
    second.load_initial(plugins.load("nn", "resnet"), tmp_path / "model.safetensors")
    assert torch.equal(first.fc8[1].get_parameter("weight"), second.fc8[1].get_parameter("weight"))
    third = made()
    nn.init.zeros_(third.backbone.net.conv1[0].weight)
    kept = third.fc8[0].get_parameter("weight").clone()
    plain = dict(first.backbone.net.state_dict()) | {"fc8.weight": torch.zeros(20, 128, 1, 1)}  # another classifier's
    save_tensors(tmp_path / "net.safetensors", plain, {})
    third.load_initial(plugins.load("nn", "resnet"), tmp_path / "net.safetensors")
    assert torch.equal(third.backbone.net.conv1[0].weight, first.backbone.net.conv1[0].weight)
    assert torch.equal(third.fc8[0].get_parameter("weight"), kept)
    third.load_initial(plugins.load("nn", "resnet"), SCRATCH)


@pytest.mark.parametrize("changes", [{"positions": [2]}, EXPLICIT], ids=["single", "explicit"])
def test_one_classifier_of_the_concatenation_is_split_among_the_branches(changes: Setting, tmp_path: Path) -> None:
    first, second, images = made(**changes), made(**changes), torch.rand(1, 3, 64, 64)
    weight = torch.cat([classifier.get_parameter("weight") for classifier in first.fc8], dim=1)
    save_tensors(tmp_path / "ppl.safetensors", dict(first.backbone.net.state_dict()) | {"fc8.weight": weight}, {})
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    second.load_initial(plugins.load("nn", "resnet"), tmp_path / "ppl.safetensors")
    assert torch.equal(first.score_maps(images, BOTH).scores, second.score_maps(images, BOTH).scores)


@pytest.mark.parametrize(
    ("title", "mode", "values"), [("implicit", "progressive", 105_282_533), ("explicit", "explicit", 105_446_373)]
)
def test_on_resnet38d_it_has_the_names_shapes_and_size_of_the_reconstruction(title: str, mode: str, values: int) -> None:
    wanted = published(f"PPL {title}", "ppl_state_dict.txt")
    with torch.device("meta"):
        labels = LabelSpace(tuple(f"class {number}" for number in range(20)))
        method = made("resnet", "resnet38d", labels, mode=mode, positions=[3, 4, 5], drop_path=0.0)
    weight = torch.empty(wanted["fc8.weight"], device="meta")
    expected = {f"backbone.net.{name}": shape for name, shape in wanted.items() if name != "fc8.weight"}
    expected |= {name: tuple(part.shape) for name, part in ppl.split_classifier(weight, len(method.fc8)).items()}
    assert {name: tuple(value.shape) for name, value in method.state_dict().items()} == expected
    assert sum(value.numel() for value in method.state_dict().values()) == values
