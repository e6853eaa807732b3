"""What a method suppresses beside each class: means and best images by brute force, for any parts, and on the page."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipeline.core import config, store
from pipeline.core.contracts import Surroundings
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Extract
from pipeline.imaging import sheet, transforms
from pipeline.jobs import inspect, score_maps
from pipeline.methods.semples import method as semples
from pipeline.nn.vit import backbone as vit
from pipeline.report import inner_maps, surroundings, templates
from pipeline.training.settings import Schedule
from tests.toy_batches import batch
from tests.toys import SCRATCH, toy_folder, toy_recipe
from tests.training_case import records_of

LABELS = LabelSpace(("disc", "<i>", "größe"))
SETTINGS = Extract((1.0, 1.5), None, True, "irn", 4, 3, 0.5, False, "fp32", 4, "gzip", 2, {})
TAGS = [(0,), (0, 1), (1,), (0, 2), (0, 1, 2), (1, 2), (0,), (0,), (0, 1), (0, 1)]


class Fake:
    """Cosine of an image without class k and what is suppressed beside class j: its brightness, less for other classes."""

    stride = 16
    description = "a <i>sea</i> & more"

    def surroundings(self, images: Tensor, pairs: Tensor) -> Surroundings:
        bright = images.mean(dim=(1, 2, 3))[pairs[:, 0]]
        match = bright[:, None] - 0.1 * (pairs[:, 1:] - torch.arange(3)).abs()
        left = torch.ones(len(pairs), 8, 8)
        left[:, :4] = 0
        return Surroundings(match, left, self.description)


class Idle(Fake):
    description = "nothing"

    def surroundings(self, images: Tensor, pairs: Tensor) -> Surroundings:
        return dataclasses.replace(super().surroundings(images, pairs), match=torch.zeros(len(pairs), 0))


@pytest.fixture
def images(tmp_path: Path) -> list[ImageRecord]:
    """Ten images, two of which are the same but for the id."""
    found = [
        dataclasses.replace(one, tags=TAGS[at]) for at, one in enumerate(records_of(toy_folder(tmp_path / "raw", val=1)))
    ]
    found = [dataclasses.replace(one, size=_size(tmp_path / "raw" / one.path)) for one in found]
    return [*found, dataclasses.replace(found[6], id="train 006 again")]


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.height, opened.width


def job_of(tmp_path: Path) -> score_maps.Job:
    return score_maps.Job(
        method="fake", backbone="vit", model=tmp_path / "model", settings=SETTINGS, options=None, root=tmp_path / "raw",
        labels=LABELS, parts=1, params_digest="", out=tmp_path / "out", device="cpu",
    )  # fmt: skip


def seen(
    monkeypatch: pytest.MonkeyPatch, kind: type[Fake], job: score_maps.Job, parts: list[list[ImageRecord]]
) -> list[Any]:
    monkeypatch.setattr(score_maps, "load", lambda *_: kind())
    return [inspect.summarise_surroundings(part, job) for part in parts]


def written(path: Path, found: inspect.SurroundingsSummary, items: Sequence[store.Item] = ()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    store.write_part(
        path, store.INSPECTION, inspect.with_surroundings(items, found), labels=LABELS, part=0, parts=1, params_digest="",
        compression="none",
    )  # fmt: skip
    return path


def test_means_and_best_images_are_those_of_brute_force(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [images[:4], images[4:8], images[8:]]))
    own: dict[int, list[tuple[float, str]]] = {label: [] for label in range(3)}
    other: dict[int, list[float]] = {label: [] for label in range(3)}
    for record in images:
        view = transforms.view_size(record.size, 1.0, 16, inspect.LONGEST)
        pixels = np.asarray(Image.open(tmp_path / "raw" / record.path).convert("RGB"))
        bright = float(transforms.tensor_of(transforms.resize(pixels, view), "cpu").mean())
        for label in range(3):
            tags = record.tags or ()
            if label in tags:
                own[label].append((-bright, record.id))
            else:
                other[label].append(float(np.mean([bright - 0.1 * abs(tag - label) for tag in tags])))
    assert found.images.tolist() == [[len(own[label]), len(other[label])] for label in range(3)]
    for label in range(3):
        mean = -float(np.mean([value for value, _ in own[label]])), float(np.mean(other[label]))
        np.testing.assert_allclose(found.sums[label] / found.images[label], mean, atol=1e-5)
        assert [image_id for _, image_id, _ in found.best[label]] == [i for _, i in sorted(own[label])[: inspect.BEST]]


def test_equal_matches_are_ordered_by_id_and_no_more_than_the_best_are_kept() -> None:
    found = inspect.SurroundingsSummary.empty(1)
    for name in "dbfaec":
        if found.is_among_best(0, 0.5, name):
            found.add(0, (-0.5, name, b""))
    assert [name for _, name, _ in found.best[0]] == ["a", "b", "c", "d"]
    assert not found.is_among_best(0, 0.5, "e") and found.is_among_best(0, 0.6, "z") and not found.is_among_best(0, 0.4, "a")


def test_a_part_depends_neither_on_others_nor_on_loaders(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [images[:4], images[4:8], images[8:]]
    forth = seen(monkeypatch, Fake, job_of(tmp_path), parts)
    decoding_ahead = dataclasses.replace(job_of(tmp_path), loaders=2)
    back = seen(monkeypatch, Fake, decoding_ahead, parts[::-1])[::-1]
    first, second = (written(tmp_path / name, inspect.merged(some)) for name, some in (("a.h5", forth), ("b.h5", back)))
    assert first.read_bytes() == second.read_bytes()


def test_the_picture_is_the_photograph_and_what_is_left_of_it(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [images[:1]]))
    picture = np.asarray(Image.open(io.BytesIO(found.best[0][0][2]))).astype(int)
    assert picture.shape[:2] == (inspect.HEIGHT, 2 * inspect.HEIGHT + sheet.GAP)
    photograph, left = picture[:, : inspect.HEIGHT], picture[:, -inspect.HEIGHT :]
    assert abs(photograph[-40:] - left[-40:]).mean() < 6  # nothing is taken out there
    assert abs(left[10:40] - 255 * transforms.PADDING).mean() < 6 < abs(photograph[10:40] - 255 * transforms.PADDING).mean()


def test_nothing_is_looked_at_where_nobody_asks_or_nothing_is_suppressed(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        not inspect.shows_surroundings(object(), 2)
        and not inspect.shows_surroundings(Fake(), 0)
        and inspect.shows_surroundings(Fake(), 2)
    )
    found = inspect.merged(seen(monkeypatch, Idle, job_of(tmp_path), [images[:4], [], images[4:]]))
    assert found.description == "nothing" and not found.best and not found.images.any()
    assert inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [[]])).description == ""
    untagged = [dataclasses.replace(images[0], tags=tags) for tags in (None, ())]
    assert inspect.tagged([*untagged, dataclasses.replace(images[0], split="val"), images[0]]) == [images[0]]


def test_images_of_one_pixel_have_a_picture_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    (tmp_path / "raw").mkdir()
    shapes, found = [(1, 1), (1, 300), (300, 1)], []
    for at, size in enumerate(shapes):
        path = tmp_path / "raw" / f"{at}.png"
        Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path)
        digest = hashlib.sha256(path.read_bytes()).digest()
        found.append(ImageRecord(f"../{at} 'ü\"<script>", path.name, size, "train", (0,), digest))
    around = inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [found]))
    assert len(around.best[0]) == 3 and all(Image.open(io.BytesIO(jpeg)).height == 128 for _, _, jpeg in around.best[0])


def section(facts: dict[str, Any]) -> str:
    return templates.environment().get_template("surroundings.html.jinja").render(suppressed=facts, method="a<b>")


def test_the_page_shows_each_class_its_means_and_its_best_images(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [images]))
    inner = store.empty(store.INSPECTION) | {
        "jpeg": np.ones(3, np.uint8),
        "panels": np.frombuffer(b"photograph,fine", np.uint8),
    }
    path = written(tmp_path / "fake.h5", found, [(images[2].id, inner)])
    records = Records(LABELS, tuple(images), ())
    facts = surroundings.read(path, records)
    assert [one["name"] for one in facts["classes"]] == list(LABELS.names)
    for label, one in enumerate(facts["classes"]):
        assert [picture["id"] for picture in one["pictures"]] == [image_id for _, image_id, _ in found.best[label]]
        assert one["images"] == found.images[label].tolist() and one["own"] > one["other"]
        for picture, (_, _, jpeg) in zip(one["pictures"], found.best[label], strict=True):
            assert base64.b64decode(picture["source"].partition(",")[2]) == jpeg
    text = section(facts)
    assert "a &lt;i&gt;sea&lt;/i&gt; &amp; more" in text and "größe" in text and "<i>" not in text and "a<b>" not in text
    assert text.count("data:image/jpeg;base64") == sum(map(len, found.best.values()))
    inside = inner_maps.read(path, records)
    assert [one["id"] for one in inside["pictures"]] == [images[2].id] and inside["panels"] == ["photograph", "fine"]


def test_the_page_says_when_nothing_is_suppressed_and_nothing_of_other_methods(tmp_path: Path) -> None:
    item = store.empty(store.INSPECTION) | {"jpeg": np.ones(3, np.uint8), "panels": np.frombuffer(b"photograph", np.uint8)}
    records = Records(LABELS, (), ())
    idle = inspect.SurroundingsSummary(
        "nothing, since suppression_weight is 0", np.zeros((3, 2)), np.zeros((3, 2), np.int64), {}
    )
    text = section(surroundings.read(written(tmp_path / "a.h5", idle, [("x", item)]), records))
    assert "nothing, since suppression_weight is 0" in text and "<table" not in text
    assert (
        section(
            surroundings.read(written(tmp_path / "b.h5", inspect.SurroundingsSummary.empty(3), [("x", item)]), records)
        ).strip()
        == ""
    )


def test_images_of_one_class_alone_have_none_of_others_to_compare_with(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [dataclasses.replace(one, tags=(0,)) for one in images]
    found = inspect.merged(seen(monkeypatch, Fake, job_of(tmp_path), [alone]))
    facts = surroundings.read(written(tmp_path / "a.h5", found), Records(LABELS, tuple(alone), ()))
    assert facts["classes"][0]["images"] == [11, 0] and "<td>–</td><td>–</td>" in section(facts)


# SemPLeS


def small(**changes: Any) -> semples.Method:
    model = toy_recipe("semples")["train"]["model"]
    model["prompt"] |= changes.pop("prompt", {})
    torch.manual_seed(0)
    params = config.parse(semples.Params, model | changes, "train.model")
    method = semples.Method(
        LabelSpace(("disc", "square", "star")), params, Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0), vit
    )
    method.load_initial(vit, SCRATCH)
    return method.eval()


def test_semples_compares_each_masked_out_image_with_the_prompts_of_all_classes() -> None:
    method, images = small(), batch().images
    pairs = torch.tensor([[0, 0], [1, 1], [1, 2]])
    described, inner = method.surroundings(images, pairs), method.inspect(images)
    assert described.match.shape == (3, 3) and described.outside.min() >= 0 and described.outside.max() <= 1
    own_class = described.match[[0, 1, 2], pairs[:, 1]]
    torch.testing.assert_close(own_class, inner["match_prompt"][pairs[:, 0], pairs[:, 1]])
    critic = method.critic()
    masked_out = critic.embed_images(critic.prepare(images)[[0]] * described.outside[:1])
    prompts = method.texts.of_prompts(critic, method.prompts)
    torch.testing.assert_close(described.match[0], (masked_out @ prompts.t())[0])


def test_one_loaded_method_serves_score_maps_surroundings_and_inner_maps(
    tmp_path: Path, images: list[ImageRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, job = small(), job_of(tmp_path)
    monkeypatch.setattr(score_maps, "load", lambda *_: method)
    records = images[:1]
    score_maps.score([np.zeros((*records[0].size, 3), np.uint8)], records, method, semples.Options(), SETTINGS, "cpu")
    around = inspect.summarise_surroundings(records, job)
    items = inspect.inspections(records, method, 3, job.root, None, "cpu")
    rows = dict(inspect.with_surroundings(items, around))
    assert rows[records[0].id]["jpeg"].size and rows[records[0].id]["beside"].tolist() == [0]


@pytest.mark.parametrize(
    ("changes", "description"),
    [
        ({}, "a learned prompt of each class"),
        ({"prompt": {"source": "random"}}, "nothing was learned"),
        ({"prompt": {"source": "words", "words": ["sea", "a meadow"]}}, "the mean of the phrases sea, a meadow"),
        ({"suppression_weight": 0.0}, "nothing, since suppression_weight is 0"),
    ],
)
def test_semples_describes_what_it_suppresses(changes: dict[str, Any], description: str) -> None:
    surroundings_of_pair = small(**changes).surroundings(batch().images, torch.tensor([[0, 0]]))
    assert description in surroundings_of_pair.description
    assert surroundings_of_pair.match.shape == (1, 0 if "suppression_weight" in changes else 3)
