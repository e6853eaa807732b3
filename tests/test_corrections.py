"""Corrected masks replace pseudo-masks; every problem of them is reported at once."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import refine_case as case
from PIL import Image

from pipeline import corrections, mask_files
from pipeline.core import records as records_file
from pipeline.core.records import Records, file_stem
from pipeline.corrections import CorrectionsError
from pipeline.exporters import cvat
from pipeline.readers import PseudoMasks

SIZES = {image_id: size for image_id, size, _, _ in case.IMAGES}


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    monkeypatch.chdir(tmp_path)
    case.build(tmp_path, refiner="none", formats=["voc_png", "coco_rle"])
    return tmp_path


def records(project: Path) -> Records:
    return records_file.read(project / "records.h5")


def corrected(image_id: str, value: int = 3) -> np.ndarray:
    mask = np.zeros(SIZES[image_id], np.uint8)
    mask[: mask.shape[0] // 2 + 1] = value
    mask[-1, -1] = 255 if mask.size > 1 else value
    return mask


def put(project: Path, name: str, mask: np.ndarray) -> None:
    path = project / "corrections" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mask_files.palette_png(mask))


def refusal(project: Path) -> str:
    with pytest.raises(CorrectionsError) as error:
        corrections.load_corrections(project / "corrections", records(project))
    return str(error.value)


def test_corrected_masks_come_out_in_the_product_and_in_every_format(project: Path) -> None:
    case.run_well("fit_refiner", "refine", "export")
    before = PseudoMasks("out/pseudo_masks")
    assert not (project / "out/pseudo_masks/corrections.json").exists()
    unchanged = {image_id: before[image_id] for image_id in before if image_id not in ("../up", "a b")}
    put(project, f"{file_stem('../up')}.png", corrected("../up", 1))
    put(project, "a b.png", corrected("a b", 2))
    case.run_well("export")
    after = PseudoMasks("out/pseudo_masks")
    assert after.ids == before.ids
    np.testing.assert_array_equal(after["../up"], corrected("../up", 1))
    np.testing.assert_array_equal(after["a b"], corrected("a b", 2))
    assert all((after[image_id] == mask).all() for image_id, mask in unchanged.items())
    with Image.open(project / "out/exports/voc_png/SegmentationClass/a b.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), corrected("a b", 2))
    summary = json.loads((project / "out/pseudo_masks/corrections.json").read_text(encoding="utf-8"))
    assert summary["corrected"] == 2 and list(summary["images"]) == ["../up", "a b"]
    assert summary["images"]["../up"]["beyond_tags"] == [] and summary["images"]["a b"]["beyond_tags"] == ["car"]
    assert summary["images"]["a b"]["pixels"] == 17 * 31 and summary["images"]["a b"]["changed"] > 0


def test_taking_a_correction_away_brings_the_old_mask_back(project: Path) -> None:
    case.run_well("fit_refiner", "refine", "export")
    first = case.contents(project / "out" / "pseudo_masks")
    put(project, "a b.png", corrected("a b"))
    case.run_well("export")
    assert case.contents(project / "out" / "pseudo_masks") != first
    (project / "corrections" / "a b.png").unlink()
    case.run_well("export")
    assert case.contents(project / "out" / "pseudo_masks") == first


def test_a_mask_that_was_exported_and_not_changed_counts_as_corrected_with_no_pixel_changed(project: Path) -> None:
    case.run_well("fit_refiner", "refine", "export")
    exported = project / "out/exports/voc_png"
    for file in ("ids.csv", "classes.txt", "ImageSets/Segmentation/train.txt", "SegmentationClass/größe.png"):
        target = project / "corrections" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((exported / file).read_bytes())
    case.run_well("export")
    summary = json.loads((project / "out/pseudo_masks/corrections.json").read_text(encoding="utf-8"))
    assert {image_id: row["changed"] for image_id, row in summary["images"].items()} == {"größe": 0}


def test_an_archive_of_cvat_unpacked_there_is_read_by_its_colours(project: Path) -> None:
    masks = {image_id: corrected(image_id, 2) for image_id in ("../up", "a b")}
    cvat.write(iter(masks.items()), records(project), project / "cvat")
    with zipfile.ZipFile(project / "cvat" / cvat.ARCHIVE) as archive:
        archive.extractall(project / "corrections")
    corrected_masks = corrections.load_corrections(project / "corrections", records(project))
    assert sorted(corrected_masks.files) == sorted(masks)
    for image_id, mask in masks.items():
        np.testing.assert_array_equal(corrected_masks.read(image_id), mask)


def test_other_colours_in_the_labelmap_are_what_counts(project: Path) -> None:
    mask = corrected("a b", 1)
    pixels = np.zeros((*mask.shape, 3), np.uint8)
    pixels[mask == 1], pixels[mask == 255] = (1, 2, 3), (9, 9, 9)
    (project / "corrections" / "labelmap.txt").write_text(
        "# x\nbackground:0,0,0::\nboat:1,2,3::\nignore:9,9,9::\nbird:4,4,4::\n"
    )
    Image.fromarray(pixels).save(project / "corrections" / "a b.png")
    np.testing.assert_array_equal(corrections.load_corrections(project / "corrections", records(project)).read("a b"), mask)
    pixels[0, 0] = (4, 4, 4)
    Image.fromarray(pixels).save(project / "corrections" / "a b.png")
    assert "'a b.png': holds the colours 4,4,4, which labelmap.txt gives to no class" in refusal(project)


def test_ids_csv_names_files_that_the_names_do_not(project: Path) -> None:
    put(project, "0001.png", corrected("größe"))
    (project / "corrections" / "ids.csv").write_text("id,file\ngröße,0001.png\na b,0002.png\n", encoding="utf-8")
    assert list(corrections.load_corrections(project / "corrections", records(project)).files) == ["größe"]


def test_every_problem_is_reported_at_once(project: Path) -> None:
    put(project, "nobody.png", corrected("a b"))
    put(project, "val.png", corrected("val"))
    put(project, "a b.png", corrected("größe"))
    put(project, "one pixel.png", np.full((1, 1), 4, np.uint8))
    put(project, "größe.png", corrected("größe"))
    put(project, "SegmentationClass/größe.png", corrected("größe"))
    Image.fromarray(np.zeros((24, 20, 3), np.uint8)).save(project / "corrections" / f"{file_stem('../up')}.png")
    (project / "corrections" / "tagless.png").write_bytes(b"no picture")
    (project / "corrections" / "a b.jpg").write_bytes(b"")
    (project / "corrections" / "%FF.png").write_bytes(b"")
    (project / "corrections" / "labelmap.txt").write_text("boat:red\n")
    (project / "corrections" / ".hidden").write_bytes(b"")
    message = refusal(project)
    for line in (
        "10 problems in",
        "'nobody.png': no image has this id",
        "'val.png': image 'val' is of split val",
        "'a b.png': 24×20 px (h×w), the upright image of 'a b' is 17×31",
        "'one pixel.png': holds the values [4]; allowed are 0..3 and 255",
        "'größe.png': 'SegmentationClass/größe.png' is a mask of image 'größe' already",
        "'%2E./up",
        "'tagless.png': not a known image format",
        "'a b.jpg': no PNG",
        "'%FF.png': no image has this id",
        "labelmap.txt line 1: 'boat:red' is not `name:red,green,blue::`",
        "correct or remove these files (docs/exports.md)",
    ):
        assert line.replace("'%2E./up", f"'{file_stem('../up')}.png': holds the colours 0,0,0") in message, line
    result = case.run("export")
    assert result.exit_code == 1 and not (project / "out").exists()


def test_an_rgb_mask_without_a_labelmap_is_refused(project: Path) -> None:
    Image.fromarray(np.zeros((17, 31, 3), np.uint8)).save(project / "corrections" / "a b.png")
    assert "an RGB image; its colours need CVAT's labelmap.txt beside it" in refusal(project)


def test_a_palette_that_an_editor_has_re_ordered_is_refused(project: Path) -> None:
    mask = corrected("a b", 3)
    image = Image.fromarray(np.where(mask == 3, 1, 0).astype(np.uint8))  # the editor numbered the colours anew …
    image.putpalette([0, 0, 0, *mask_files.colour_of(3)])  # … and kept them
    image.save(project / "corrections" / "a b.png")
    assert "value 1 (boat) has the colour of 3 (sheep): an image editor has re-ordered the palette" in refusal(project)


@pytest.mark.parametrize("mode", ["L", "grey palette", "foreign palette"])
def test_greyscale_and_foreign_palettes_are_read_by_their_values(project: Path, mode: str) -> None:
    mask = corrected("a b", 3)
    image = Image.fromarray(mask)
    if mode != "L":
        step = 1 if mode == "grey palette" else 3
        image.putpalette(
            [(index * step + shift) % 256 for index in range(256) for shift in ((0,) * 3 if step == 1 else (7, 9, 5))]
        )
    image.save(project / "corrections" / "a b.png")
    np.testing.assert_array_equal(corrections.load_corrections(project / "corrections", records(project)).read("a b"), mask)


def test_the_digest_follows_masks_and_ids_and_nothing_else(project: Path) -> None:
    def digest() -> str:
        return corrections.load_corrections(project / "corrections", records(project)).digest

    empty_digest = digest()
    put(project, "a b.png", corrected("a b"))
    corrected_digest = digest()
    (project / "corrections" / ".gitkeep").write_bytes(b"")
    (project / "corrections" / "README.txt").write_text("who corrected what")
    assert digest() == corrected_digest != empty_digest
    put(project, "a b.png", corrected("a b", 1))
    assert digest() not in (corrected_digest, empty_digest)


def test_a_png_of_a_photograph_is_refused_without_listing_its_colours(project: Path) -> None:
    (project / "corrections" / "labelmap.txt").write_text("boat:1,2,3::\n")
    noise = np.random.default_rng(0).integers(0, 256, (17, 31, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    (project / "corrections" / "a b.png").write_bytes(buffer.getvalue())
    assert len(refusal(project)) < 1000
