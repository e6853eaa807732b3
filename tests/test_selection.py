"""A phase that keeps its best epoch: scored without masks, the same bytes for any ranks and after a crash."""

from __future__ import annotations

import csv
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.core import config
from pipeline.core.contracts import Batch, Clock, Phase
from pipeline.core.labels import LabelSpace
from pipeline.jobs import train
from pipeline.methods.semples import method as semples
from pipeline.methods.semples.masking import soft_masks
from pipeline.nn.vit import backbone as vit
from pipeline.training import checkpoint, loop, resume, scoring
from pipeline.training.data import Draw
from pipeline.training.epochs import ends_epoch, step_count
from pipeline.training.settings import Training
from tests.toy_batches import batch
from tests.toys import SCRATCH, toy_folder, toy_recipe
from tests.training_case import Toy, job_in, records_of, trained

EPOCHS = 4


class Scored(Toy):
    """Its score is how near the head's first bias is to a goal; each step moves the bias up, in the last epoch `worse` times
    as far."""

    goal, worse = 1.5, 1000.0

    def phases(self) -> list[Phase]:
        return [
            Phase(
                "only", epochs=EPOCHS, batch_size=4, shards=4, lr=0.1, weight_decay=0.0, optimiser="sgd", schedule="poly",
                warmup=0, lr_floor=1.0, keep_best=("head.",),
            )
        ]  # fmt: skip

    def losses(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        factor = self.worse if clock.step / clock.steps >= 1 - 1 / EPOCHS else 1.0
        return {"bias": -factor * self.head.bias[0] + 0 * super().losses(batch, clock)["tags"]}

    def score(self, batch: Batch) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        # images take part, so that it matters which rank scores which
        distance = (self.head.bias[0] - self.goal).abs() + 1e-3 * batch.images.mean()
        return torch.stack([-distance * len(batch.images), distance.new_tensor(len(batch.images))])


class Steady(Scored):
    goal, worse = 100.0, 1.0


class Unscored(Scored):
    def score(self, batch: Batch) -> Tensor:
        return torch.zeros(2)


class NotFinite(Scored):
    def score(self, batch: Batch) -> Tensor:
        return torch.tensor([float("nan"), 1.0])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return toy_folder(tmp_path / "raw", train=10, val=0)


def weights(job: loop.Job) -> dict[str, Tensor]:
    return checkpoint.read_tensors(job.work / "trained.safetensors")


def scores_of(job: loop.Job) -> list[float]:
    """Of the epochs, as logged."""
    with (job.work / "log.csv").open(encoding="utf-8") as file:
        return [float(row["score"]) for row in csv.DictReader(file) if row["score"]]


def test_a_phase_ends_with_the_weights_of_its_best_epoch(tmp_path: Path, root: Path) -> None:
    job = job_in(tmp_path / "a", root, build=Scored)
    trained(job)
    logged = scores_of(job)
    assert len(logged) == EPOCHS and logged[-1] < -100 and max(logged[:-1]) > -1
    assert -abs(float(weights(job)["head.bias"][0]) - Scored.goal) == pytest.approx(max(logged), abs=1e-3)


def test_the_last_epoch_may_be_the_best(tmp_path: Path, root: Path) -> None:
    job = job_in(tmp_path / "a", root, build=Steady)
    trained(job)
    logged = scores_of(job)
    assert logged == sorted(logged) and len(set(logged)) == EPOCHS
    assert -abs(float(weights(job)["head.bias"][0]) - Steady.goal) == pytest.approx(logged[-1], abs=1e-3)


def test_the_best_epoch_is_the_same_bytes_with_one_or_two_processes(tmp_path: Path, root: Path) -> None:
    alone = trained(job_in(tmp_path / "a", root, build=Scored))
    assert alone == trained(job_in(tmp_path / "b", root, build=Scored, ranks=2))


@pytest.mark.parametrize("stop_after", [1, 8, 9, 10])
def test_a_run_that_is_cut_off_remembers_its_best_epoch(
    tmp_path: Path, root: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(job_in(tmp_path / "a", root, build=Scored))
    monkeypatch.setattr(resume, "CHECKPOINT_SECONDS", 0.0)
    job = job_in(tmp_path / "b", root, build=Scored)
    steps: Any = loop.train(job).notes
    for _ in range(stop_after):
        next(steps)
    steps.close()
    assert (job.work / "checkpoint.safetensors").exists()
    assert whole == trained(job)


@pytest.mark.parametrize("kind", [Unscored, NotFinite])
def test_where_nothing_can_be_scored_the_last_weights_stay(tmp_path: Path, root: Path, kind: type[Scored]) -> None:
    job = job_in(tmp_path / "a", root, build=kind)
    trained(job)
    assert float(weights(job)["head.bias"][0]) > 100


def test_scoring_looks_at_the_same_few_images_without_augmentation(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = job_in(tmp_path / "a", root).images
    monkeypatch.setattr(scoring, "SCORED_IMAGES", 4)
    scored = scoring.scored_images(images)
    again = scoring.scored_images(dataclasses.replace(images, records=records_of(root)[::-1]))
    assert scored.records == again.records and len(scored) == 4
    first, second = scored.batch(0, [Draw(0, 0)]), scored.batch(0, [Draw(0, 0)])
    assert torch.equal(first.images, second.images) and first.valid.all()


@given(count=st.integers(1, 30), size=st.integers(1, 12), epochs=st.integers(1, 4))
def test_an_epoch_ends_in_the_step_that_shows_its_last_image(count: int, size: int, epochs: int) -> None:
    phase = dataclasses.replace(Scored().phases()[0], epochs=epochs, batch_size=size)
    steps = step_count(phase, count)
    for step in range(steps):
        shown = range(step * size, (step + 1) * size)
        expected = step + 1 == steps or any((place + 1) % count == 0 for place in shown)
        assert ends_epoch(phase, step, count) == expected


# SemPLeS


def params_of(select: str) -> tuple[Training, semples.Params]:
    section = toy_recipe("semples")["train"]
    section["model"]["select"] = select
    section["schedule"] |= {"epochs": 3, "lr": 0.05}
    training = config.parse(Training, section, "train")
    return training, config.parse(semples.Params, training.model, "train.model")


def small(select: str) -> semples.Method:
    training, params = params_of(select)
    labels = LabelSpace(("disc", "square", "star"))
    torch.manual_seed(0)
    method = semples.Method(labels, params, training.schedule, vit)
    method.load_initial(vit, SCRATCH)
    return method


def test_semples_keeps_an_epoch_of_refine_or_the_last_step() -> None:
    for select, prefixes in {"last": (), "critic": ("head.", "adaptive_attention_fusion.")}.items():
        assert {phase.name: phase.keep_best for phase in small(select).phases()} == {
            "critic": (), "align": (), "prompt": (), "refine": prefixes,
        }  # fmt: skip
    section: dict[str, Any] = toy_recipe("semples")["train"]["model"]
    with pytest.raises(config.ParamsError, match=r"select.*last.*critic"):
        config.parse(semples.Params, section | {"select": "best"}, "train.model")


@torch.no_grad()
def test_the_score_of_semples_is_how_much_better_masked_in_images_match_their_class_than_masked_out_ones() -> None:
    method, tagged = small("critic").eval(), batch(((1, 0, 0), (0, 1, 1)))
    critic, masks, total = method.critic(), method.params.masks, 0.0
    texts = method.texts.of_classes(critic)
    maps = method.score_maps(tagged.images, semples.Options()).scores
    for index, label in ((0, 0), (1, 1), (1, 2)):
        size = (critic.side, critic.side)
        mask = soft_masks(maps[index, label][None], size, eps=masks.eps, contrast=masks.contrast)
        image = critic.prepare(tagged.images)[index][None]
        inside, outside = critic.embed_images(image * mask)[0], critic.embed_images(image * (1 - mask))[0]
        total += float((inside - outside) @ texts[label])
    torch.testing.assert_close(method.score(tagged), torch.tensor([total, 3.0]), atol=1e-5, rtol=1e-4)
    assert not method.score(batch(((0, 0, 0), (0, 0, 0)))).any()


def test_semples_ends_with_its_epoch_of_the_highest_score(tmp_path: Path, root: Path) -> None:
    training, params = params_of("critic")
    build = partial(train.build, "methods", "semples", "vit", LabelSpace(("disc", "square")), training, params, SCRATCH)
    job = job_in(tmp_path / "a", root, build=build)
    job = dataclasses.replace(job, images=dataclasses.replace(job.images, augment=training.augment))
    trained(job)
    method = build()
    method.load_state_dict(weights(job))
    images = scoring.scored_images(job.images)
    total, count = method.eval().score(images.batch(3, [Draw(index, 0) for index in range(len(images))])).tolist()
    logged = scores_of(job)
    assert len(logged) == 3 and total / count == pytest.approx(max(logged), rel=1e-3, abs=1e-5)
    assert max(logged) - min(logged) > 1e-4  # or any epoch would do
