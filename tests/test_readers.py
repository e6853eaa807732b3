"""Readers for other tools: supervision reads exports and masks, FiftyOne shows a run. Skipped where a package is absent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline import readers
from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.exporters import coco_rle, yolo_seg
from stages import to_fiftyone as command
from tests.toys import Toy, toy_image

LABELS = LabelSpace(("disc", "square"))
IDS = ("a/ü x", "b", "val")


def mask_of(image_id: str) -> np.ndarray:
    return toy_image(IDS.index(image_id))[1]


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Photographs, records, pseudo-masks, a prediction and an audit table as the stages write them."""
    monkeypatch.chdir(tmp_path)
    images = []
    for number, image_id in enumerate(IDS):
        path = tmp_path / "raw" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(toy_image(number)[0]).save(path)
        tags = (None, (1,), (0, 1))[number]
        images.append(ImageRecord(image_id, path.name, (64, 64), "val" if image_id == "val" else "train", tags, b"\0" * 32))
    records.write(tmp_path / "data" / "records.h5", Records(LABELS, tuple(images), ()))
    folder = tmp_path / "artifacts" / "cam"
    common: dict[str, Any] = {"labels": LABELS, "part": 0, "parts": 1, "params_digest": "", "compression": "gzip"}
    masks = ((image_id, {"mask": mask_of(image_id)}) for image_id in IDS[:2])
    store.write_part(store.part_path(folder / "pseudo_masks", 0), store.PSEUDO_MASKS, masks, **common)
    prediction = {"label": mask_of("val"), "confidence": np.full((64, 64), 200, np.uint8)}
    store.write_part(store.part_path(folder / "predictions", 0), store.PREDICTIONS, [("val", prediction)], **common)
    corrections = {"schema": "corrections", "version": 1, "corrected": 1, "images": {"b": {}}}
    (folder / "pseudo_masks" / store.CORRECTED).write_text(json.dumps(corrections), encoding="utf-8")
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "cam.csv").write_text(
        "id,split,stage,tags,truth,miou,score,reasons\n"
        "a/ü x,train,refined,?,0,,0.1,leak\na/ü x,train,pseudo_masks,?,0,,0.25,empty:disc|edges\n"
        "val,val,predictions,disc|square,1,0.5,0.75,\n",
        encoding="utf-8",
    )
    Toy(tmp_path / "raw").write(tmp_path)
    return tmp_path


def stream(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    masks = readers.PseudoMasks(folder / "artifacts" / "cam" / "pseudo_masks")
    return ((image_id, masks[image_id]) for image_id in masks)


@pytest.mark.filterwarnings("ignore")
def test_supervision_reads_the_masks_of_coco_rle_exactly(exported: Path) -> None:
    supervision = pytest.importorskip("supervision")
    coco_rle.write(stream(exported), records.read(exported / "data" / "records.h5"), exported / "coco")
    dataset = supervision.DetectionDataset.from_coco(
        str(exported / "raw"), str(exported / "coco" / "annotations.json"), force_masks=True
    )
    assert dataset.classes == ["disc", "square", "ignore"] and len(dataset) == 2
    for path, _, detections in dataset:
        restored = np.zeros((64, 64), np.uint8)
        for region, index in zip(detections.mask, detections.class_id, strict=True):
            restored[region] = index + 1
        np.testing.assert_array_equal(restored, mask_of(IDS[int(Path(path).stem)]))


@pytest.mark.filterwarnings("ignore")
def test_supervision_rounds_the_polygons_of_yolo_seg_so_masks_are_at_most_a_pixel_wider(exported: Path) -> None:
    supervision = pytest.importorskip("supervision")
    out = exported / "yolo"
    yolo_seg.write(stream(exported), records.read(exported / "data" / "records.h5"), out)
    for line in (out / "images.csv").read_text("utf-8").splitlines()[1:]:
        _, source, file = line.split(",")
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).symlink_to(exported / "raw" / source)
    folders = [str(out / kind / "train") for kind in ("images", "labels")]
    dataset = supervision.DetectionDataset.from_yolo(*folders, str(out / "data.yaml"), force_masks=True)
    assert dataset.classes == ["disc", "square"] and len(dataset) == 2
    for path, _, detections in dataset:
        mask = mask_of(IDS[int(Path(path).resolve().stem)])
        for index in set(detections.class_id.tolist()):
            restored = detections.mask[detections.class_id == index].any(axis=0)
            region = np.pad(mask == index + 1, 1)
            wider = np.logical_or.reduce([np.roll(region, (y, x), (0, 1)) for y in (0, 1) for x in (0, 1)])[1:-1, 1:-1]
            assert restored[mask == index + 1].all() and wider[restored].all()


@pytest.mark.filterwarnings("ignore")
def test_a_mask_becomes_a_detection_per_class_with_its_mean_confidence() -> None:
    pytest.importorskip("supervision")
    mask = np.zeros((5, 6), np.uint8)
    mask[1:3, 2:5], mask[4, 0], mask[0, 0] = 2, 1, 255
    confidence = np.where(mask == 2, 51, 255).astype(np.uint8)
    detections = readers.to_supervision(mask, LABELS, confidence)
    assert detections.class_id.tolist() == [0, 1] and detections["class_name"].tolist() == ["disc", "square"]
    np.testing.assert_array_equal(detections.mask, [mask == 1, mask == 2])
    np.testing.assert_allclose(detections.confidence, [1.0, 0.2])
    assert detections.xyxy.tolist() == [[0, 4, 0, 4], [2, 1, 4, 2]]
    assert readers.to_supervision(mask, LABELS, confidence / np.float32(255)).confidence.tolist() == pytest.approx([1, 0.2])
    assert len(readers.to_supervision(np.full((3, 3), 255, np.uint8), LABELS)) == 0


@pytest.mark.skipif(find_spec("fiftyone") is not None, reason="FiftyOne is installed")
def test_without_fiftyone_the_command_says_how_to_install_it(exported: Path) -> None:
    result = CliRunner().invoke(command.main, ["cam"])
    assert result.exit_code == 1 and "pip install 'tag2mask[fiftyone]'" in result.output


@pytest.fixture
def fiftyone() -> Any:
    module = pytest.importorskip("fiftyone")
    try:
        module.list_datasets()
    except Exception as error:
        pytest.skip(f"FiftyOne has no database here: {error}")
    return module


def test_fiftyone_shows_every_image_with_tags_masks_score_reasons_and_split(exported: Path, fiftyone: Any) -> None:
    result = CliRunner().invoke(command.main, ["cam", "--name", "tag2mask-test", "--overwrite", "--temporary"])
    assert result.exit_code == 0, result.output
    dataset = fiftyone.load_dataset("tag2mask-test")
    try:
        assert not dataset.persistent and dataset.default_mask_targets == {1: "disc", 2: "square", 255: "ignore"}
        samples = {sample.tag2mask_id: sample for sample in dataset}
        assert sorted(samples) == sorted(IDS)
        assert {i: sorted(sample.tags) for i, sample in samples.items()} == {
            "a/ü x": ["train"], "b": ["corrected", "train"], "val": ["val"]
        }  # fmt: skip
        first, second, val = (samples[image_id] for image_id in IDS)
        assert first.filepath == str(exported / "raw" / "0.png") and first.image_tags is None
        assert [tag.label for tag in val.image_tags.classifications] == ["disc", "square"]
        assert (first.score, first.reasons, first.miou) == (0.25, ["empty:disc", "edges"], None)
        assert (val.score, val.reasons, val.miou, second.score) == (0.75, [], 0.5, None)
        np.testing.assert_array_equal(first.pseudo_mask.get_mask(), mask_of("a/ü x"))
        np.testing.assert_array_equal(val.prediction.get_mask(), mask_of("val"))
        assert val.pseudo_mask is first.prediction is None
        again = CliRunner().invoke(command.main, ["cam", "--name", "tag2mask-test"])
        assert again.exit_code == 1 and "has a data set 'tag2mask-test' already" in again.output
    finally:
        dataset.delete()
