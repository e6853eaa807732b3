"""The one training loop: the same bytes whatever the processes, after a crash, and errors that say what to do."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from pipeline.core.config import ParamsError, parse
from pipeline.core.contracts import Batch, Clock, Phase
from pipeline.core.records import ChangedImageError
from pipeline.imaging import rand_augment, transforms
from pipeline.jobs import train
from pipeline.training import checkpoint, loop, optim, resume, run, shared_memory
from pipeline.training.data import TrainingImages, order
from pipeline.training.exchange import BlockSum, block, tree_sum
from pipeline.training.loss_scale import GROWS_AFTER, LossScale
from pipeline.training.settings import RandAugment, Schedule
from tests import toys
from tests.toys import toy_folder
from tests.training_case import AUGMENT, Toy, job_in, trained


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return toy_folder(tmp_path / "raw", train=10, val=0)


def test_training_gives_the_same_bytes_twice_and_with_one_or_three_processes(tmp_path: Path, root: Path) -> None:
    alone = trained(job_in(tmp_path / "a", root))
    assert alone == trained(job_in(tmp_path / "b", root))
    assert alone == trained(job_in(tmp_path / "c", root, ranks=3))


def test_decoding_ahead_in_threads_changes_nothing(tmp_path: Path, root: Path) -> None:
    assert trained(job_in(tmp_path / "a", root)) == trained(job_in(tmp_path / "b", root, loaders=3))


@pytest.mark.parametrize("stop_after", [2, 6])
def test_a_run_that_is_cut_off_ends_with_the_same_bytes(
    tmp_path: Path, root: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(job_in(tmp_path / "a", root))
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    job = job_in(tmp_path / "b", root)
    steps = loop.train(job).notes
    for _ in range(stop_after):
        next(steps)
    steps.close()
    assert (job.work / "checkpoint.safetensors").exists()
    assert whole == trained(job)


def counting_threads(folder: Path) -> Toy:
    """Notes this process and its number of torch threads, each time that a trainable is built."""
    with (folder / f"{os.getpid()}.txt").open("a", encoding="utf-8") as file:
        file.write(f"{torch.get_num_threads()}\n")
    return Toy()


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes start with two torch threads, whatever the machine has."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_process_builds_its_trainable_with_one_torch_thread(tmp_path: Path, root: Path, ranks: int) -> None:
    folder = tmp_path / "threads"
    folder.mkdir()
    trained(job_in(tmp_path / "a", root, ranks=ranks, build=partial(counting_threads, folder)))
    counts = [path.read_text(encoding="utf-8").split() for path in folder.iterdir()]
    assert len(counts) == ranks
    assert all(set(of_process) == {"1"} for of_process in counts)


def only_in(process: int) -> Toy:
    if os.getpid() != process:
        raise ValueError("no memory left")
    return Toy()


@pytest.mark.parametrize("through", ["shared memory", "gloo"])
def test_the_run_ends_with_an_error_as_soon_as_another_process_fails(
    tmp_path: Path, root: Path, through: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "fits", lambda ranks, size: through == "shared memory")
    with pytest.raises(RuntimeError, match="no memory left"):
        trained(job_in(tmp_path / "a", root, ranks=2, build=partial(only_in, os.getpid())))


@given(shards=st.integers(1, 40), ranks=st.integers(1, 12), seed=st.integers(0, 1000))
def test_every_number_of_ranks_adds_shards_in_the_same_order(shards: int, ranks: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=shards) * 10.0 ** np.arange(shards)  # their sum depends on the order
    numbers = [torch.tensor([value], dtype=torch.float32) for value in values]
    blocks = [block(shards, rank, ranks) for rank in range(ranks)]
    assert [shard for of_rank in blocks for shard in of_rank] == list(range(shards))
    sums = []
    for of_rank in blocks:
        total = BlockSum(torch.zeros(1))
        for shard in of_rank:
            total.begin()
            total.memory.copy_(numbers[shard])
            total.end()
        total.finish()
        sums += [total.memory] if len(of_rank) else []
    assert torch.equal(tree_sum(sums), tree_sum([number.clone() for number in numbers]))


def test_up_to_three_shards_are_added_one_after_another() -> None:
    numbers = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert tree_sum(numbers).tolist() == [0.0]  # (1e8 + 1) - 1e8 in f32


def test_the_loss_scale_halves_at_once_and_doubles_after_many_finite_steps() -> None:
    scale = LossScale("fp16")
    first = scale.value
    scale.update(False)
    assert scale.value == first / 2
    for _ in range(GROWS_AFTER - 1):
        scale.update(True)
    assert scale.value == first / 2
    scale.update(True)
    assert scale.value == first
    for precision in ("fp32", "bf16"):
        fixed = LossScale(precision)
        fixed.update(False)
        assert fixed.value == 1


def test_another_seed_gives_other_weights(tmp_path: Path, root: Path) -> None:
    assert trained(job_in(tmp_path / "a", root)) != trained(job_in(tmp_path / "b", root, seed=1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_to_finite_weights(tmp_path: Path, root: Path, precision: str) -> None:
    job = job_in(tmp_path / "a", root, precision=precision)
    trained(job)
    weights = checkpoint.read_tensors(job.work / "trained.safetensors")
    assert all(torch.isfinite(value.float()).all() for value in weights.values())


class Exploding(Toy):
    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return {"tags": super().losses(batch, clock)["tags"] * float("inf")}


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path: Path, root: Path) -> None:
    with pytest.raises(RuntimeError, match=r"phase first, step 0.*lower schedule\.lr"):
        trained(job_in(tmp_path / "a", root, build=Exploding))


@pytest.fixture
def reads_every_ten_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device for which the host has to wait."""
    monkeypatch.setattr(run, "read_steps", lambda device: 10)


class Long(Toy):
    """25 steps."""

    def phases(self) -> list[Phase]:
        return [dataclasses.replace(super().phases()[0], epochs=10)]


def test_figures_that_are_read_late_change_no_byte(
    tmp_path: Path, root: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = trained(job_in(tmp_path / "a", root, build=Long))
    request.getfixturevalue("reads_every_ten_steps")
    assert trained(job_in(tmp_path / "b", root, build=Long)) == at_once
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    job = job_in(tmp_path / "c", root, build=Long)
    steps: Any = loop.train(job).notes
    for _ in range(13):
        next(steps)
    steps.close()
    assert loop.train(job).done == 10
    assert trained(job) == at_once


class ExplodingLate(Long):
    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        return {"tags": super().losses(batch, clock)["tags"] * (float("inf") if clock.step == 13 else 1.0)}


@pytest.mark.usefixtures("reads_every_ten_steps")
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    job = job_in(tmp_path / "a", root, build=ExplodingLate)
    with pytest.raises(RuntimeError, match=r"phase first, step 13: gradients are not finite \(losses: tags inf"):
        trained(job)
    assert loop.train(job).done == 10
    saved = checkpoint.read_tensors(job.work / run.CHECKPOINT)
    assert all(torch.isfinite(value).all() for value in saved.values())


class Frozen(Toy):
    """Three shards, and statistics that no forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
        self.register_buffer("mean", values)

    def phases(self) -> list[Phase]:
        return [dataclasses.replace(super().phases()[0], batch_size=3, shards=3)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_statistics_that_no_shard_changes_keep_their_bytes(tmp_path: Path, root: Path, ranks: int) -> None:
    """The sum of three equal numbers, divided by three, may be another number."""
    job = job_in(tmp_path / "a", root, build=Frozen, ranks=ranks)
    trained(job)
    weights, initial = checkpoint.read_tensors(job.work / "trained.safetensors"), Frozen().state_dict()
    assert torch.equal(weights["mean"], initial["mean"])
    assert not torch.equal(weights["body.1.running_mean"], initial["body.1.running_mean"])


class Unused(Toy):
    """A layer of which the losses know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


def test_a_parameter_without_a_gradient_is_trained_as_with_a_gradient_of_0(tmp_path: Path, root: Path) -> None:
    job = job_in(tmp_path / "a", root, build=Unused)
    trained(job)
    weights = checkpoint.read_tensors(job.work / "trained.safetensors")
    initial = Unused().unused.weight
    decayed = weights["unused.weight"] / initial
    assert (decayed < 1).all() and (decayed > 0.9).all()  # weight decay alone


def test_no_image_is_a_clear_error(tmp_path: Path, root: Path) -> None:
    empty = TrainingImages([], root, 2, AUGMENT, 0, None)
    with pytest.raises(ValueError, match="no training image"):
        trained(job_in(tmp_path / "a", root, images=empty))


def test_every_epoch_shows_each_image_once() -> None:
    draws = [draw for step in range(6) for draw in order(seed=3, phase=0, count=8, batch_size=4, step=step)]
    for epoch in range(3):
        assert sorted(draw.index for draw in draws if draw.epoch == epoch) == list(range(8))


def test_a_batch_larger_than_the_data_set_takes_several_passes() -> None:
    assert [draw.epoch for draw in order(seed=0, phase=0, count=3, batch_size=8, step=0)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_an_image_that_changed_since_prepare_is_an_error(tmp_path: Path, root: Path) -> None:
    job = job_in(tmp_path / "a", root)
    (root / "images" / "train 003.png").write_bytes(b"other")
    with pytest.raises(ChangedImageError, match="has changed since prepare"):
        trained(job)


def test_an_image_that_changed_is_the_error_of_the_run_whichever_process_reads_it(tmp_path: Path, root: Path) -> None:
    """Without a traceback of another process: a stage shows the text alone."""
    job = job_in(tmp_path / "a", root, ranks=2)
    for path in (root / "images").glob("train *.png"):
        path.write_bytes(b"other")
    with pytest.raises(
        (ChangedImageError, RuntimeError), match="has changed since prepare"
    ) as caught:  # of this, another rank
        trained(job)
    assert "Traceback" not in str(caught.value)


def test_the_learning_rate_rises_in_warm_up_and_falls_to_its_end() -> None:
    for name in ("poly", "linear", "cosine", "one_cycle"):
        phase = Schedule(1, 0, 4, 1, 0.1, 0.0, "adamw", name, 5, 0.0).phase("p")  # type: ignore[arg-type]
        factors = [optim.lr_factor(phase, step, 50) for step in range(50)]
        assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert factors[-1] < 0.1 and max(factors) <= 1


@pytest.mark.parametrize("name", ["poly", "linear", "cosine", "one_cycle"])
def test_the_learning_rate_ends_at_its_floor(name: str) -> None:
    phase = Schedule(1, 0, 4, 1, 0.1, 0.0, "adamw", name, 0, 0.25).phase("p")  # type: ignore[arg-type]
    factors = [optim.lr_factor(phase, step, 50) for step in range(50)]
    assert factors[-1] == pytest.approx(0.25, abs=0.03) and max(factors) <= 1
    assert all(later < earlier for earlier, later in pairwise(factors[25:]))


def test_no_epochs_leave_the_weights_as_they_were(tmp_path: Path, root: Path) -> None:
    class Idle(Toy):
        def phases(self) -> list[Phase]:
            return [dataclasses.replace(phase, epochs=0) for phase in super().phases()]

    job = job_in(tmp_path / "a", root, build=Idle)
    trained(job)
    after = checkpoint.read_tensors(tmp_path / "a" / "trained.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in Idle().state_dict().items())
    assert (tmp_path / "a" / "log.csv").read_text().startswith("step,phase,lr,loss")


@given(seed=st.integers(0, 10_000), h=st.integers(1, 90), w=st.integers(1, 90), area_min=st.floats(0.05, 1))
def test_random_crops_by_area_lie_inside_the_photograph(seed: int, h: int, w: int, area_min: float) -> None:
    left, top, right, bottom = rand_augment.area_box(np.random.default_rng(seed), (h, w), area_min)
    assert 0 <= left < right <= w + 1e-9 and 0 <= top < bottom <= h + 1e-9
    assert 0.74 < (right - left) / (bottom - top) < 1.34


@given(seed=st.integers(0, 10_000), operations=st.integers(1, 4), magnitude=st.floats(0, 10))
def test_rand_augment_keeps_size_and_depends_on_its_seed_alone(seed: int, operations: int, magnitude: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (23, 31, 3), dtype=np.uint8)
    first, second = (
        rand_augment.rand_augment(image, np.random.default_rng(seed), operations=operations, magnitude=magnitude, spread=0.5)
        for _ in range(2)
    )
    assert first.shape == image.shape and first.dtype == np.uint8 and np.array_equal(first, second)


@pytest.mark.parametrize("name", sorted(rand_augment.OPERATIONS))
def test_every_operation_changes_a_picture_at_full_strength(name: str) -> None:
    noise = np.random.default_rng(0).integers(20, 200, (32, 32, 3), dtype=np.uint8)
    changed = np.asarray(rand_augment.OPERATIONS[name](Image.fromarray(noise), 1.0, -1.0))
    assert changed.shape == noise.shape and (changed != noise).any()


def test_erasing_fills_one_box_with_noise() -> None:
    pixels = np.full((3, 40, 50), 2.0, np.float32)
    rand_augment.erase(pixels, np.random.default_rng(0))
    changed = (pixels != 2).all(axis=0)
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    assert 0.01 < changed.mean() < 0.4 and pixels[:, changed].min() >= 0 and pixels[:, changed].max() <= 1


def test_strong_augmentation_trains_the_same_bytes_for_any_ranks(tmp_path: Path, root: Path) -> None:
    strong = dataclasses.replace(AUGMENT, area_min=0.1, rand_augment=RandAugment(2, 9.0, 0.5), erase=0.5)
    jobs = []
    for name, ranks, loaders in (("a", 1, 0), ("b", 2, 2)):
        job = job_in(tmp_path / name, root, ranks=ranks, loaders=loaders)
        jobs.append(dataclasses.replace(job, images=dataclasses.replace(job.images, augment=strong)))
    assert trained(jobs[0]) == trained(jobs[1])


def test_augmentation_that_masks_cannot_follow_is_refused() -> None:
    toy = toys.Toy(Path("raw"))
    toy.recipes["cam"]["retrain"]["augment"]["erase"] = 0.5
    with pytest.raises(ParamsError, match=r"recipes/cam\.yaml: retrain\.augment.*masks would not follow"):
        train.training_of(toy.settings(), "segmenters")


def test_shards_that_do_not_divide_the_batch_are_refused() -> None:
    values = {
        "epochs": 1,
        "min_steps": 0,
        "batch_size": 5,
        "shards": 2,
        "lr": 0.1,
        "weight_decay": 0,
        "optimiser": "sgd",
        "schedule": "poly",
        "warmup": 0,
        "lr_floor": 0.0,
    }
    with pytest.raises(ParamsError, match="no multiple of shards"):
        parse(Schedule, values, "train.schedule")


@pytest.mark.parametrize("shape", [(1, 1), (7, 90), (64, 64), (300, 20)])
def test_a_crop_has_its_size_and_marks_padding(shape: tuple[int, int]) -> None:
    image, mask = np.full((*shape, 3), 200, np.uint8), np.ones(shape, np.uint8)
    crop = partial(transforms.crop, size=32, flip=True, jitter=np.ones(3), at=(0.3, 0.9))
    pixels, valid, labels = crop(image, mask, scale=0.5)
    assert pixels.shape == (3, 32, 32) and labels is not None
    np.testing.assert_array_equal(labels == 1, valid)
    np.testing.assert_allclose(pixels[:, valid], 200 / 255, atol=1e-3)
    assert not valid.all() and valid.any()


def test_an_unflipped_crop_without_scaling_keeps_the_pixels() -> None:
    image = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    pixels, valid, _ = transforms.crop(image, None, size=20, scale=1.0, flip=False, jitter=np.ones(3), at=(0.5, 0.5))
    assert valid.all()
    np.testing.assert_allclose(pixels.transpose(1, 2, 0) * 255, image, atol=0.01)


@pytest.mark.parametrize(
    ("size", "scale", "expected"), [((375, 500), 1.0, (368, 496)), ((1, 1), 1.0, (16, 16)), ((61, 83), 1.5, (96, 128))]
)
def test_views_have_sides_that_the_backbone_can_cut_into_patches(
    size: tuple[int, int], scale: float, expected: tuple[int, int]
) -> None:
    assert transforms.view_size(size, scale, 16) == expected


def test_a_huge_image_is_scaled_down_to_the_long_side() -> None:
    assert transforms.view_size((6000, 8000), 1.0, 16, long_side=1024) == (768, 1024)


def test_images_become_tensors_alone_as_in_a_stack() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    stacked = transforms.tensor_of(images, "cpu")
    assert stacked.shape == (2, 3, 5, 7) and stacked.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(torch.stack([transforms.tensor_of(image, "cpu") for image in images]), stacked)
    np.testing.assert_array_equal((stacked[1, 2] * 255).round().numpy(), images[1, ..., 2])
