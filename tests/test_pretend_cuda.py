"""All that is trained runs on CUDA, as far as that can be told without a GPU: devices match, results are the CPU's, and the
host waits no more often than it is known to."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.core import config, plugins, store
from pipeline.core.contracts import Batch, Clock
from pipeline.core.labels import LabelSpace
from pipeline.training import deterministic
from pipeline.training.checkpoint import read_tensors
from pipeline.training.loop import Job, train
from pipeline.training.precision import autocast
from pipeline.training.settings import Schedule
from tests.pretend_cuda import CUDA, DeviceMismatch, NotDeterministic, Pretend, pretended_cuda
from tests.refine_case import CRF
from tests.toy_masks import Masks
from tests.toys import SCRATCH, learned_fit, smp_model, toy_folder, toy_recipe
from tests.training_case import Toy, job_in

STEPS = 10  # of a phase: the first and the last are tried, before and after warm-ups
SCHEDULE = Schedule(1, 0, 4, 2, 1e-3, 0.01, "adamw", "poly", 0, 0.0)
THREE, TWO = LabelSpace(("disc", "square", "star")), LabelSpace(("disc", "square"))
METHODS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("cam", "vit", "scenes_vit", {}),
    ("cam", "resnet", "scenes_resnet", {}),
    ("cam", "mit", "scenes_mit", {}),
    ("weaktr", "vit", "scenes_vit", {}),
    ("afa", "mit", "scenes_mit", {}),
    ("afa", "vit", "scenes_vit", {"energy": {"weight": 0.01, "cells": 8, "sigma_rgb": 0.06, "sigma_xy": 0.2}}),
    ("apc", "vit", "scenes_vit", {"context": "bilstm", "context_width": 8,
                                  "contrast": {"weight": 0.5, "high": 0.85, "low": 0.15}}),
    ("apc", "resnet", "scenes_resnet", {"pooling": {"rule": "gap", "ratio": 0.9, "k_max": 4}}),
    ("ppl", "resnet", "scenes_resnet", {}),
    ("ppl", "vit", "scenes_vit", {}),
    ("semples", "vit", "scenes_vit", {}),
    ("semples", "vit", "scenes_vit", {"select": "critic", "fusion_features": "heads"}),
]  # fmt: skip
FAMILIES = {"vit": "scenes_vit", "mit": "scenes_mit", "resnet": "scenes_resnet"}
SEGMENTER_OF = {"vit": "cam", "mit": "afa", "resnet": "ppl"}  # a method whose recipe has it


def batch(labels: LabelSpace, masks: bool) -> Batch:
    """Two images of noise with padding at their right; class 2 lies in the masks' middle."""
    generator = torch.Generator().manual_seed(0)
    tags = torch.zeros(2, len(labels))
    tags[0, 0] = tags[1, 1] = tags[1, -1] = 1
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, :, 48:] = False
    values = torch.zeros(2, 64, 64, dtype=torch.uint8)
    values[:, 16:40, 16:40], values[:, 44:48] = 2, 255
    values[~valid] = 255
    return Batch(torch.rand(2, 3, 64, 64, generator=generator), tags, valid, values if masks else None)


def on_cuda(given: Batch) -> Batch:
    return given.to("cuda")


def method(labels: LabelSpace, name: str, family: str, architecture: str, changes: dict[str, Any]) -> Any:
    module, torch_family = plugins.load("methods", name), plugins.load("nn", family)
    model = toy_recipe(name)["train"]["model"] | {"architecture": architecture, "image_size": 64} | changes
    torch.manual_seed(0)
    built = module.Method(labels, config.parse(module.Params, model, "model"), SCHEDULE, torch_family)
    if hasattr(built, "load_initial"):
        built.load_initial(torch_family, SCRATCH)
    return built


def network(refiner: str, family: str) -> Any:
    module = plugins.load("refiners", refiner)
    params = config.parse(module.FitParams, learned_fit(FAMILIES[family], CRF)[refiner], "fit_refiner")
    torch.manual_seed(0)
    return module.Network(params.model, params.schedule, plugins.load("nn", family))


def segmenter(labels: LabelSpace, name: str, changes: dict[str, Any]) -> Any:
    module = plugins.load("segmenters", name)
    model = smp_model() if name == "smp" else toy_recipe(SEGMENTER_OF[name])["retrain"]["model"]
    if "architecture" in model:
        model |= {"architecture": FAMILIES[name], "image_size": 64}
    torch.manual_seed(0)
    return module.Segmenter(
        labels, config.parse(module.Params, model | changes, "model"), SCHEDULE, plugins.load("nn", name)
    )


def losses(trainable: Any, given: Batch, clock: Clock, precision: str, device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(clock.step)
    with autocast(precision, device):
        values = trainable.losses(given, clock)
    return {name: value.float() for name, value in values.items()}


def assert_steps_run(trainable: Any, given: Batch, precision: str) -> None:
    """Forward and backward passes of every phase, without a wait for the device. In fp32 the losses are those of the CPU."""
    clocks = [Clock(number, at, STEPS) for number in range(len(trainable.phases())) for at in (0, STEPS - 1)]
    pretended = copy.deepcopy(trainable.train())
    expected = [losses(trainable, given, clock, "fp32", "cpu") for clock in clocks] if precision == "fp32" else []
    waited, made = [], []
    with pretended_cuda() as counts:
        deterministic.use("cuda")
        pretended, given = pretended.to("cuda"), on_cuda(given)
        for clock in clocks:
            before = counts.totals()
            values = losses(pretended, given, clock, precision, "cuda")
            waited.append(counts.since(before)["waits"])
            assert_gradients_on_cuda(pretended, clock, values)
            made.append({name: value.detach().cpu() for name, value in values.items()})
    assert not any(waited), (waited, counts.waits)
    assert all(torch.isfinite(value) for values in made for value in values.values())
    if expected:
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def assert_gradients_on_cuda(trainable: Any, clock: Clock, values: dict[str, torch.Tensor]) -> None:
    groups = trainable.param_groups(trainable.phases()[clock.phase])
    parameters = [parameter for group in groups for parameter in group.parameters]
    gradients = torch.autograd.grad(torch.stack(list(values.values())).sum(), parameters, allow_unused=True)
    assert any(gradient is not None for gradient in gradients)
    assert all(gradient is None or (isinstance(gradient, Pretend) and gradient.device == CUDA) for gradient in gradients)


precisions = pytest.mark.parametrize("precision", ["fp32", "bf16"])


def test_every_method_refiner_network_and_segmenter_is_tried() -> None:
    assert {name for name, *_ in METHODS} == set(plugins.available("methods"))
    learned = {name for name in plugins.available("refiners") if hasattr(plugins.load("refiners", name), "Network")}
    assert learned == {"affinitynet", "irn"}
    assert set(plugins.available("segmenters")) == {*SEGMENTER_OF, "smp"}


@precisions
@pytest.mark.parametrize(("name", "family", "architecture", "changes"), METHODS)
def test_every_phase_of_a_method(name: str, family: str, architecture: str, changes: dict[str, Any], precision: str) -> None:
    trainable = method(THREE, name, family, architecture, changes)
    assert_steps_run(trainable, batch(THREE, masks=False), precision)


@pytest.mark.parametrize(("name", "family", "architecture", "changes"), METHODS)
def test_score_maps_and_what_is_inspected_stay_on_the_device(
    name: str, family: str, architecture: str, changes: dict[str, Any]
) -> None:
    trainable = method(THREE, name, family, architecture, changes).eval()
    options = config.parse(plugins.load("methods", name).Options, toy_recipe(name)["extract"]["options"], "options")
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = trainable.score_maps(images, options, keep_affinity=False)
    with pretended_cuda():
        trainable.to("cuda")
        with torch.inference_mode():
            maps = trainable.score_maps(images.to("cuda"), options, keep_affinity=False)
            assert all(value.device == CUDA for value in (maps.scores, maps.tag_logits))
            torch.testing.assert_close(maps.scores.cpu(), expected.scores, rtol=1e-4, atol=1e-5)
            assert all(value.device == CUDA for value in trainable.inspect(images[:1].to("cuda")).values())


@precisions
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refiner", ["irn", "affinitynet"])
def test_the_network_of_a_learned_refiner(refiner: str, family: str, precision: str) -> None:
    assert_steps_run(network(refiner, family), batch(THREE, masks=True), precision)


@precisions
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit", {"balance": "pixels"}), ("vit", {"balance": "background_foreground"}),
        ("mit", {"balance": "pixels"}), ("mit", {"balance": "background_foreground"}),
        ("resnet", {}), ("smp", {}),
    ],
)  # fmt: skip
def test_a_segmenter_never_waits(name: str, changes: dict[str, Any], precision: str) -> None:
    assert_steps_run(segmenter(THREE, name, changes), batch(THREE, masks=True), precision)


def trained(folder: Path, job: Job) -> dict[str, torch.Tensor]:
    folder.mkdir()
    list(train(dataclasses.replace(job, work=folder)).notes)
    return read_tensors(folder / "trained.safetensors")


def job_of(build: partial[Any], folder: Path) -> Job:
    """Two steps per phase on 8 toy images, with masks for a segmenter."""
    job = job_in(folder, toy_folder(folder / "raw", train=8, val=0), build=build)
    augment = dataclasses.replace(job.images.augment, size=64)
    masks = Masks() if build.func is segmenter else None
    return dataclasses.replace(job, images=dataclasses.replace(job.images, augment=augment, masks=masks))


TRAINED = [
    partial(method, TWO, "cam", "vit", "scenes_vit", {}),
    partial(method, TWO, "weaktr", "vit", "scenes_vit", {}),
    partial(method, TWO, "afa", "mit", "scenes_mit", {}),
    partial(segmenter, TWO, "vit", {"balance": "pixels"}),
    partial(Toy),
]


@pytest.mark.parametrize("build", TRAINED, ids=["cam", "weaktr", "afa", "segmenter vit", "SGD"])
def test_a_training_ends_with_the_weights_of_the_cpu(
    build: partial[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deterministic, "use", lambda device: None)  # with it, PyTorch interpolates by other operators
    job = job_of(build, tmp_path)
    on_cpu = trained(tmp_path / "cpu", job)
    with pretended_cuda() as counts:
        on_cuda = trained(tmp_path / "cuda", dataclasses.replace(job, device="cuda"))
    assert counts.kernels.total() > 100
    assert on_cuda.keys() == on_cpu.keys()
    initial = build().state_dict()
    assert any(not torch.equal(value, initial[name]) for name, value in on_cuda.items())
    for name, value in on_cuda.items():
        # a gradient of 0 but for rounding, like that of keys' biases, is scaled up by AdamW, where a wrong one moves weights
        # by about the learning rate, 1e-3
        torch.testing.assert_close(value, on_cpu[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_eight_threads_read_masks_of_eight_parts_for_a_training_on_cuda(tmp_path: Path) -> None:
    job = job_of(partial(segmenter, TWO, "vit", {"balance": "pixels"}), tmp_path)
    for part, record in enumerate(job.images.records):
        mask = {"mask": Masks().read(record.id, "mask")}
        store.write_part(
            store.part_path(tmp_path / "masks", part), store.PSEUDO_MASKS, [(record.id, mask)], labels=TWO, part=part,
            parts=8, params_digest="", compression="gzip",
        )  # fmt: skip
    masks = store.Store(tmp_path / "masks", store.PSEUDO_MASKS)
    weights = []
    for loaders in (0, 8):
        with pretended_cuda():
            images = dataclasses.replace(job.images, masks=masks)
            reading = dataclasses.replace(job, images=images, loaders=loaders, device="cuda")
            weights.append(trained(tmp_path / f"{loaders} loaders", reading))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_only_a_training_on_cuda_asks_for_deterministic_kernels(tmp_path: Path) -> None:
    job = job_of(partial(segmenter, TWO, "vit", {"balance": "pixels"}), tmp_path)
    trained(tmp_path / "cpu", job)
    assert not torch.are_deterministic_algorithms_enabled()
    with pretended_cuda():
        weights = trained(tmp_path / "cuda", dataclasses.replace(job, device="cuda", precision="bf16"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_tf32_is_used_for_products_and_convolutions_where_the_recipe_says_so_alone() -> None:
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn]
    for precision, allowed in (("tf32", True), ("fp32", False), ("tf32", True), ("bf16", False)):
        with autocast(precision, "cpu"):
            assert torch.is_autocast_enabled("cpu") is (precision == "bf16")
        assert [setting.allow_tf32 for setting in settings] == [allowed, allowed], precision


def test_an_operand_that_lies_on_the_cpu_is_an_error() -> None:
    with pretended_cuda():
        pretended, plain = torch.ones(3, device="cuda"), torch.ones(3)
        for mistake in (
            lambda: pretended + plain,
            lambda: torch.cat([pretended, plain]),
            lambda: torch.stack([pretended.sum(), plain.sum()]),
            lambda: plain[pretended.long()],
            lambda: torch.nn.Linear(3, 2)(pretended),
        ):
            with pytest.raises(DeviceMismatch, match="CPU"):
                mistake()
        assert (pretended * plain.sum()).device == CUDA  # a single number may


@pytest.mark.parametrize("name", ["cam", "weaktr"])
def test_position_embeddings_of_another_grid_have_gradients_in_a_fixed_order(name: str) -> None:
    trainable = method(THREE, name, "vit", "scenes_vit", {"image_size": 96}).train()
    given, clock = batch(THREE, masks=False), Clock(0, 0, STEPS)
    gradients = []
    for device in ("cpu", "cuda"):
        with pretended_cuda():
            deterministic.use(device)
            placed = copy.deepcopy(trainable).to(device)
            values = losses(placed, on_cuda(given) if device == "cuda" else given, clock, "fp32", device)
            positions = dict(placed.backbone.net.named_parameters())["pos_embed"]
            gradients.append(torch.autograd.grad(torch.stack(list(values.values())).sum(), positions)[0].cpu())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("decoder", ["pspnet", "upernet"])
def test_a_decoder_that_pools_has_gradients_in_a_fixed_order(decoder: str) -> None:
    small = {"psp_out_channels": 32} if decoder == "pspnet" else {"decoder_channels": 32}
    assert_steps_run(segmenter(THREE, "smp", smp_model(decoder, options=small)), batch(THREE, masks=True), "fp32")


def test_an_operator_that_adds_in_no_fixed_order_is_an_error_where_one_is_asked_for() -> None:
    with pretended_cuda():
        maps = torch.rand(1, 3, 4, 4, device="cuda").requires_grad_()
        labels = torch.zeros(1, 4, 4, dtype=torch.long, device="cuda")
        mistakes = [
            lambda: F.cross_entropy(maps, labels, reduction="sum"),
            lambda: F.adaptive_max_pool2d(maps, 2).sum().backward(),
            lambda: F.grid_sample(maps, torch.zeros(1, 2, 2, 2, device="cuda"), align_corners=False).sum().backward(),
            lambda: maps.cumsum(dim=1),
        ]
        for mistake in mistakes:
            mistake()
        deterministic.use("cuda")
        for mistake in mistakes:
            with pytest.raises(NotDeterministic):
                mistake()


def test_what_the_host_waits_for_is_counted() -> None:
    with pretended_cuda() as counts:
        values = torch.tensor([0.0, 2.0, 3.0], device="cuda")
        assert counts.totals() | {"kernels": 0} == {"kernels": 0, "uploads": 1, "waits": 0}
        for wait in (
            lambda: values[0].item(),
            lambda: bool(values.sum() > 1),
            lambda: values.tolist(),
            lambda: values.nonzero(),
            lambda: values[values > 1],
            lambda: values.unique(),
            lambda: values.cpu(),
        ):
            before = counts.totals()
            wait()
            assert counts.since(before)["waits"] == 1
        before = counts.totals()
        (values > 1).sum()
        assert counts.since(before) == {"kernels": 2, "uploads": 0, "waits": 0}


def test_a_mistake_in_a_loss_is_caught() -> None:
    given, clock = batch(THREE, masks=False), Clock(0, 0, STEPS)
    trainable = method(THREE, "cam", "vit", "scenes_vit", {}).train()
    correct = trainable.losses
    trainable.losses = lambda given, clock: correct(dataclasses.replace(given, tags=given.tags.cpu()), clock)
    with pretended_cuda(), pytest.raises(DeviceMismatch, match="CPU"):
        losses(trainable.to("cuda"), on_cuda(given), clock, "fp32", "cuda")
    trainable.losses = lambda given, clock: {name: value * value.item() for name, value in correct(given, clock).items()}
    with pretended_cuda() as counts:
        pretended, given = trainable.to("cuda"), on_cuda(given)
        before = counts.totals()
        values = losses(pretended, given, clock, "fp32", "cuda")
        assert counts.since(before)["waits"] == len(values)


def test_autocast_computes_products_in_bf16_and_losses_in_single_precision() -> None:
    with pretended_cuda(), autocast("bf16", "cuda"):
        values = torch.ones(2, 2, device="cuda")
        product = values @ values
        assert product.dtype == torch.bfloat16
        assert product.softmax(dim=-1).dtype == torch.float32
        assert (product + 1).dtype == torch.bfloat16
