"""Stage relabel: only classes of the tags win, and the bytes are the same for any number of processes and after a stop."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import runtime
from pipeline.core import records, store
from pipeline.jobs import relabel
from stages import relabel as stage
from tests.test_segment import CRF, LABELS, SETTINGS, bytes_of, picture, save
from tests.test_segmenter_vit import small
from tests.toys import Toy

TAGS = {"id 0": (1,), "id 1": (0, 1), "id 2": (), "id 3": None, "id 4": (0,)}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with images of awkward sizes, their tags, params.yaml, a recipe and an untrained segmenter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    (tmp_path / "raw").mkdir()
    listed = []
    for (image_id, tags), size in zip(TAGS.items(), [(40, 33), (1, 1), (9, 64), (20, 20), (31, 8)], strict=True):
        path = tmp_path / "raw" / f"{image_id}.png"
        Image.fromarray(picture(*size)).save(path)
        digest = hashlib.sha256(path.read_bytes()).digest()
        listed.append(records.ImageRecord(image_id, path.name, size, "train", tags, digest))
    listed.append(dataclasses.replace(listed[0], id="id 5", split="val"))
    records.write(tmp_path / "records.h5", records.Records(LABELS, tuple(listed), ()))
    save(tmp_path / "segmenter.safetensors", small(), LABELS)
    choose(tmp_path)
    yield tmp_path


def choose(folder: Path, **changes: Any) -> None:
    """Writes params.yaml and the recipe, its section relabel with `changes`."""
    toy = Toy(folder / "raw")
    toy.recipes["cam"]["segment"] = SETTINGS | {"flip": True}
    toy.recipes["cam"]["relabel"] = {"enabled": True, "crf": dataclasses.asdict(CRF)} | changes
    toy.write(folder)


def run(out: str) -> Result:
    arguments = ["cam", "--records", "records.h5", "--segmenter", "segmenter.safetensors", "--relabelled", out]
    return CliRunner().invoke(stage.main, arguments)


def test_train_images_alone_are_seen_and_only_their_tags_win(project: Path) -> None:
    result = run("relabelled")
    assert result.exit_code == 0, result.output
    stored = store.Store(project / "relabelled", store.RELABELLED)
    assert list(stored.ids) == list(TAGS) and stored.labels == LABELS
    for image_id, item in stored:
        tags = TAGS[image_id]
        possible = (0, 1) if tags is None else tags
        assert item["classes"].tolist() == list(possible)
        assert set(np.unique(item["label"])) <= {0, *(tag + 1 for tag in possible)}
        assert item["probabilities"].shape[0] == 1 + len(possible)
        np.testing.assert_allclose(item["probabilities"].astype(np.float32).sum(axis=0), 1, atol=2e-3)
    assert stored["id 0"]["label"].shape == (40, 33) and stored["id 0"]["probabilities"].shape == (2, 10, 9)
    assert not stored["id 2"]["label"].any() and (stored["id 2"]["confidence"] == 255).all()


def test_an_image_without_a_class_does_not_go_through_the_network(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = relabel.segment.read_image, []
    monkeypatch.setattr(relabel.segment, "read_image", lambda record, root: seen.append(record.id) or real(record, root))
    assert run("relabelled").exit_code == 0
    assert seen == ["id 0", "id 1", "id 3", "id 4"]


def test_where_it_is_off_the_store_has_no_images(project: Path) -> None:
    choose(project, enabled=False)
    assert run("relabelled").exit_code == 0
    assert len(store.Store(project / "relabelled", store.RELABELLED)) == 0


def test_three_processes_and_threads_beside_them_write_the_same_bytes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("one").exit_code == 0
    monkeypatch.setenv("TAG2MASK_WORKERS", "3")
    assert run("three").exit_code == 0
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.setattr(runtime, "loaders", lambda device: 2)
    monkeypatch.setattr(runtime, "beside", lambda device: 2)
    assert run("side by side").exit_code == 0
    assert bytes_of(project / "one") == bytes_of(project / "three") == bytes_of(project / "side by side")


def test_parts_that_a_killed_run_finished_are_not_computed_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = relabel.relabel_part, []

    def dying(item: Any, job: relabel.Job) -> int:
        seen.append(item[0])
        if item[0] == 1 and len(seen) == 2:
            raise ValueError("killed")
        return real(item, job)

    monkeypatch.setattr(relabel, "relabel_part", dying)
    assert "killed" in run("relabelled").output
    assert not (project / "relabelled").exists()
    assert run("relabelled").exit_code == 0
    assert seen == [0, 1, 1, 2]
    assert run("again").exit_code == 0
    assert bytes_of(project / "relabelled") == bytes_of(project / "again")


def test_wrong_settings_are_named(project: Path) -> None:
    choose(project, crf={"iterations": 0})
    result = run("relabelled")
    assert result.exit_code == 1 and "relabel.crf.iterations" in result.output
    choose(project, enabled="perhaps")
    assert "relabel.enabled" in run("relabelled").output


@given(st.integers(1, 20), st.integers(1, 20), st.sets(st.integers(0, 3)))
def test_what_is_not_tagged_is_struck_out_and_the_likeliest_of_the_rest_wins(h: int, w: int, tags: set[int]) -> None:
    generator = np.random.default_rng(h * 21 + w)
    stack, classes = generator.random((5, h, w)).astype(np.float32), np.array(sorted(tags), np.int64)
    item = relabel.fields(np.zeros((h, w, 3), np.uint8), stack / stack.sum(axis=0), classes, None)
    struck = stack.copy()
    struck[[value for value in range(1, 5) if value - 1 not in tags]] = -1
    np.testing.assert_array_equal(item["label"], struck.argmax(axis=0))
    best, total = struck.max(axis=0), np.maximum(struck, 0).sum(axis=0)
    assert np.abs(item["confidence"] / 255 - best / total).max() <= 0.5 / 255 + 1e-5
