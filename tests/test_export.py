"""export: what becomes 255, what is an error, and the formats users take away."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import numpy as np
import pytest
import refine_case as case
from PIL import Image

from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.core.sections import Export
from pipeline.imaging.palette import voc_palette
from pipeline.jobs import export
from pipeline.readers import PseudoMaskDataset, PseudoMasks

LABELS = LabelSpace(("cat", "dog"))
TRAIN = sorted(image_id for image_id, _, split, _ in case.IMAGES if split == "train")


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    case.build(tmp_path, refiner="none", ignore_below=0.6, formats=["hdf5", "voc_png"])
    case.run_well("fit_refiner", "refine", "export")
    return tmp_path / "out"


def record(tags: tuple[int, ...] | None) -> ImageRecord:
    return ImageRecord("the id", "x.png", (1, 4), "train", tags, b"")


def fields(label: list[int]) -> dict[str, np.ndarray]:
    rows = {"label": [label], "confidence": [[255, 127, 128, 0]], "disagree": [[0, 0, 1, 1]]}
    return {name: np.array(row, np.uint8) for name, row in rows.items()}


@pytest.mark.parametrize(
    ("ignore_below", "ignore_disagreement", "expected"),
    [
        (0.0, False, [0, 1, 1, 0]),
        (0.5, False, [0, 255, 1, 255]),
        (0.0, True, [0, 1, 255, 255]),
        (0.5, True, [0, 255, 255, 255]),
        (1.0, False, [0, 255, 255, 255]),
    ],
)
def test_unsure_pixels_become_255(ignore_below: float, ignore_disagreement: bool, expected: list[int]) -> None:
    settings = Export(ignore_below, ignore_disagreement, (), 2, "gzip")
    assert export.mask_of(fields([0, 1, 1, 0]), record((0,)), LABELS, settings).tolist() == [expected]


def test_a_class_outside_the_tags_is_an_error_that_names_the_image() -> None:
    with pytest.raises(ValueError, match="the id"):
        export.mask_of(fields([0, 1, 2, 0]), record((0,)), LABELS, Export(0.0, False, (), 2, "gzip"))


def test_an_image_that_nobody_tagged_may_hold_what_the_network_found() -> None:
    assert export.mask_of(fields([0, 1, 2, 0]), record(None), LABELS, Export(0.0, False, (), 2, "gzip")).tolist() == [
        [0, 1, 2, 0]
    ]


def test_the_reader_gives_every_train_image_at_its_size(exported: Path) -> None:
    masks = PseudoMasks(exported / "pseudo_masks")
    assert masks.ids == TRAIN and len(masks) == len(TRAIN) and masks.labels == case.LABELS
    sizes = {image_id: size for image_id, size, _, _ in case.IMAGES}
    assert all(masks[image_id].shape == sizes[image_id] and masks[image_id].dtype == np.uint8 for image_id in masks.ids)
    assert any((masks[image_id] == 255).any() for image_id in masks.ids)


def test_the_lines_of_h5py_in_the_docs_read_the_same_masks(exported: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "pseudo_masks.md").read_text(encoding="utf-8")
    lines = text.split("## Without our code")[1].split("## ")[0].replace("artifacts/cam", exported.as_posix())
    namespace: dict[str, dict[str, np.ndarray]] = {}
    exec(textwrap.dedent(lines), namespace)  # the promise is that these very lines work
    masks = PseudoMasks(exported / "pseudo_masks")
    assert sorted(namespace["masks"]) == TRAIN
    assert all((namespace["masks"][image_id] == masks[image_id]).all() for image_id in TRAIN)


def test_odd_ids_become_safe_files_and_come_back_through_the_table(exported: Path) -> None:
    folder = exported / "exports" / "voc_png"
    with (folder / "ids.csv").open(encoding="utf-8", newline="") as file:
        files = {row["id"]: folder / row["file"] for row in csv.DictReader(file)}
    assert sorted(files) == TRAIN
    assert all(path.resolve().parent == (folder / "SegmentationClass").resolve() for path in files.values())
    masks = PseudoMasks(exported / "pseudo_masks")
    for image_id, path in files.items():
        with Image.open(path) as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), masks[image_id])
    listed = (folder / "ImageSets/Segmentation/train.txt").read_text(encoding="utf-8").splitlines()
    assert listed == [files[image_id].stem for image_id in TRAIN]


def test_the_palette_is_that_of_voc() -> None:
    colours = voc_palette()
    known = {
        0: (0, 0, 0),
        1: (128, 0, 0),
        2: (0, 128, 0),
        8: (64, 0, 0),
        15: (192, 128, 128),
        20: (0, 64, 128),
        255: (224, 224, 192),
    }
    assert {value: tuple(colours[value].tolist()) for value in known} == known
    assert len(np.unique(colours, axis=0)) == 256


def test_exports_exist_and_say_what_was_asked(exported: Path) -> None:
    assert "voc_png" in (exported / "exports" / "README.txt").read_text(encoding="utf-8")


def test_the_torch_data_set_gives_image_and_mask_of_one_size(exported: Path) -> None:
    dataset = PseudoMaskDataset(exported.parent / "records.h5", exported / "pseudo_masks", exported.parent / "raw")
    assert len(dataset) == len(TRAIN) and dataset.ids == TRAIN
    masks = PseudoMasks(exported / "pseudo_masks")
    for index, image_id in enumerate(TRAIN):
        image, mask = dataset[index]
        assert tuple(image.shape) == (3, *mask.shape)
        np.testing.assert_array_equal(mask.numpy(), masks[image_id])
