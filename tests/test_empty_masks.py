"""Where most tagged classes have no pixel, the terminal and the figures say so, without any truth."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from pipeline import runtime
from pipeline.audit import empty_masks
from pipeline.core import records as records_file
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.jobs import export
from tests.toys import Toy

NAMES = ("cat", "cow", "dog")


def table(*images: tuple[tuple[int, ...], tuple[int, ...]]) -> np.ndarray:
    """Of images, each its tags and the mask values that it has."""
    total = np.zeros((len(NAMES), 2), np.int64)
    for tags, values in images:
        total += empty_masks.counts(tags, np.bincount(values, minlength=256), len(NAMES))
    return total


def test_masks_in_which_every_class_has_pixels_are_no_finding() -> None:
    assert empty_masks.finding(table(((0,), (0, 1)), ((1, 2), (2, 3))), NAMES, "pseudo_masks") is None


def test_masks_of_background_alone_are_a_finding_that_names_the_classes() -> None:
    found = empty_masks.finding(table(((0,), (0,)), ((1,), (0, 2)), ((2,), (0, 255))), NAMES, "pseudo_masks")
    assert found is not None
    assert found["message"] == "2 of 3 tagged classes have no pixel in any mask: cat, dog"
    assert (found["classes"], found["without_pixels"], found["tags"], found["tags_without_pixels"]) == (
        3,
        ["cat", "dog"],
        3,
        2,
    )
    line = empty_masks.warning("apc", found)
    assert line.startswith("pseudo-masks of apc: 2 of 3 tagged classes have no pixel in any mask: cat, dog; what to do: ")
    assert "plots/apc/train.csv" in line and "min_steps" in line


def test_classes_with_a_pixel_here_and_there_are_a_finding_where_most_tags_have_none() -> None:
    images = [((0,), (0, 1)), ((1,), (0, 2)), ((2,), (0, 3))] + [((0, 1, 2), (0,))] * 2
    found = empty_masks.finding(table(*images), NAMES, "pseudo_masks")
    assert found is not None and found["message"] == "6 of 9 tags have no pixel in their image's mask"


@pytest.mark.parametrize("images", [[], [((), (0,))]], ids=["no image", "no tag"])
def test_without_a_tag_nothing_can_be_missing(images: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert empty_masks.finding(table(*images), NAMES, "pseudo_masks") is None


def test_classes_that_no_image_is_tagged_with_do_not_count() -> None:
    assert empty_masks.finding(table(((0,), (0, 1))), NAMES, "pseudo_masks") is None


@pytest.mark.parametrize(("value", "said"), [(0, True), (1, False)])
def test_export_says_at_its_end_that_masks_are_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, value: int, said: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corrections").mkdir()
    labels = LabelSpace(("disc",))
    images = tuple(ImageRecord(f"{number}", f"{number}.png", (4, 4), "train", (0,), bytes(32)) for number in range(3))
    records_file.write(Path("records.h5"), Records(labels, images, ()))
    label, sure = np.full((4, 4), value, np.uint8), np.full((4, 4), 255, np.uint8)
    items = [(record.id, {"label": label, "confidence": sure, "disagree": np.zeros_like(label)}) for record in images]
    store.write_part(
        store.part_path(Path("refined"), 0), store.REFINED, items, labels=labels, part=0, parts=1, params_digest="",
        compression="none",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="tag2mask"):
        export.run(
            Toy(Path("raw")).settings(), records=Path("records.h5"), refined=Path("refined"),
            corrections=Path("corrections"), pseudo_masks=Path("pseudo_masks"), exports=Path("exports"), engine=runtime,
        )  # fmt: skip
    assert ("warning: pseudo-masks of cam: 1 of 1 tagged classes have no pixel in any mask: disc" in caplog.text) == said
