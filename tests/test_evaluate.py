"""evaluate and report on toy stores: figures, missing truth, hostile names, no torch."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import metrics, metrics_file, stage_order
from pipeline.audit import gallery, indicators
from pipeline.audit.summary import headline, summary
from pipeline.audit.tally import Inputs, Tally, audit_of, tally_batch
from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Evaluate, Report
from pipeline.jobs.evaluate import Outs, write_tables
from pipeline.report import page, run_metrics
from tests import page_case
from tests.toys import PROJECT, toy_image

LABELS = LabelSpace(("<script>alert(1)</script>", 'größe "x"'))
SETTINGS = Evaluate("background", 20, 6, 32)


STORES = ("truth", "scoremaps", "refined", "pseudo_masks", "predictions", "held_out", "relabelled")


def build(root: Path, *, with_truth: int = 8, decoder: bool = False, relabelled: bool = False) -> tuple[Inputs, Records]:
    """Eight images (five train) and stores in which every stage has made some mistakes of its own."""
    found, items = [], {name: [] for name in STORES}
    (root / "raw").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(8):
        image, mask, tags = toy_image(index)
        image_id = f"{index} <b>&\"' ü"
        Image.fromarray(image).save(root / "raw" / f"{index}.png")
        digest = hashlib.sha256((root / "raw" / f"{index}.png").read_bytes()).digest()
        classes = tuple({"disc": 0, "square": 1}[tag] for tag in tags)
        split = "train" if index < 5 else "val"
        found.append(ImageRecord(image_id, f"{index}.png", (64, 64), split, classes, digest))
        scores = rng.random((len(classes), 16, 16)).astype(np.float16)
        items["scoremaps"].append(
            (image_id, {"classes": np.array(classes, np.uint16), "scores": scores,
                        "agreement": np.full(len(classes), 0.5, np.float16), "tag_logits": np.zeros(2, np.float32),
                        "affinity": np.zeros((0, 0), np.float16), "grid": np.zeros(2, np.uint16),
                        "decoded": mask.copy() if decoder else np.zeros((0, 0), np.uint8)})
        )  # fmt: skip
        label = np.where(rng.random((64, 64)) < 0.8, mask, 0).astype(np.uint8)
        sure = np.full((64, 64), 200, np.uint8)
        if split == "train":
            items["refined"].append((image_id, {"label": label, "confidence": sure, "disagree": np.zeros_like(label)}))
            items["pseudo_masks"].append(
                (image_id, {"mask": np.where(rng.random((64, 64)) < 0.9, label, 255).astype(np.uint8)})
            )
            if relabelled:
                none = np.zeros(0, np.uint16), np.ones((1, 16, 16), np.float16)
                seen = {"classes": none[0], "probabilities": none[1], "label": mask, "confidence": sure}
                items["relabelled"].append((image_id, seen))
            if index:  # cross_validate has nothing of the first
                fields = {"soft_min": np.float32([index / 10]), "held_out_agreement": np.float32([np.nan])}
                items["held_out"].append((image_id, fields))
        else:
            items["predictions"].append((image_id, {"label": label, "confidence": sure}))
        if index < with_truth:
            items["truth"].append((image_id, {"mask": mask}))
    schemas = {
        "truth": store.TRUTH, "scoremaps": store.SCORE_MAPS, "refined": store.REFINED, "pseudo_masks": store.PSEUDO_MASKS,
        "predictions": store.PREDICTIONS,
        "held_out": store.HELD_OUT, "relabelled": store.RELABELLED,
    }  # fmt: skip
    for name, schema in schemas.items():
        store.write_part(
            store.part_path(root / name, 0),
            schema,
            items[name],
            labels=LABELS,
            part=0,
            parts=1,
            params_digest="",
            compression="gzip",
        )
    inputs = Inputs(
        root / "truth",
        root / "scoremaps",
        root / "refined",
        root / "pseudo_masks",
        root / "predictions",
        root / "held_out",
        root / "relabelled",
        0.4,
        SETTINGS,
        LABELS,
        root / "raw",
    )
    return inputs, Records(LABELS, tuple(found), (("gone <i>", "broken & bent"),))


def outs_of(folder: Path) -> Outs:
    """Where dvc.yaml has stage evaluate write, for a run called cam."""
    plots = folder / "plots" / "cam"
    return Outs(
        metrics=folder / "metrics/cam.json", figures=folder / "audit/cam.json", images=folder / "audit/cam.csv",
        small_masks=folder / "audit/cam.h5", gallery=folder / "gallery/cam.h5", thresholds=plots / "threshold.csv",
        per_class=plots / "per_class.csv",
        confusion=plots / "confusion.csv",
    )  # fmt: skip


def figures_of(inputs: Inputs, read: Records, chunk: int = 3) -> dict[str, Any]:
    """What audit/<run>.json would hold."""
    return summary(audit_of(tallied(inputs, read, chunk)), inputs, read, "digest")


def tallied(inputs: Inputs, read: Records, chunk: int = 3) -> Tally:
    tally = Tally.empty(3, SETTINGS.threshold_bins)
    for at in range(0, len(read), chunk):
        tally.add(tally_batch(read.images[at : at + chunk], inputs)[0])
    return tally


def test_images_that_are_decoded_ahead_have_the_same_figures_and_pictures(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    ahead = replace(inputs, loaders=2)
    assert json.dumps(figures_of(ahead, read)) == json.dumps(figures_of(inputs, read))
    images = gallery.gallery_images(audit_of(tallied(inputs, read)), read, 8)
    for at, (here, there) in enumerate(zip(gallery.items(images, inputs), gallery.items(images, ahead), strict=True)):
        assert here[0] == there[0] == images[at].record.id
        assert {name: value.tobytes() for name, value in here[1].items()} == {
            name: value.tobytes() for name, value in there[1].items()
        }


def test_masks_of_background_alone_are_a_figure_that_the_report_shows(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, with_truth=0)
    assert "empty_masks" not in figures_of(inputs, read)
    items = [(record.id, {"mask": np.zeros((64, 64), np.uint8)}) for record in read.split("train")]
    blank = tmp_path / "blank"
    store.write_part(
        store.part_path(blank, 0), store.PSEUDO_MASKS, items, labels=LABELS, part=0, parts=1, params_digest="",
        compression="gzip",
    )  # fmt: skip
    found = figures_of(replace(inputs, pseudo_masks=blank), read)["empty_masks"]
    assert found["without_pixels"] == list(LABELS.names) and found["message"].startswith("2 of 2 tagged classes")


def test_figures_are_those_of_counting_all_pixels_at_once(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    found = figures_of(inputs, read)
    truth, masks = store.Store(inputs.truth, store.TRUTH), store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS)
    counts = sum(metrics.confusion(truth.read(i, "mask"), masks.read(i, "mask"), 3) for i in masks.ids)
    assert found["stages"]["pseudo_masks"]["miou"] == round(metrics.miou(np.asarray(counts), protocol="background"), 5)
    assert found["threshold"]["regret"] >= 0 and found["stages"]["pseudo_masks"]["ignored"] > 0.05
    assert 0 < found["background_only"]["train"] < 0.5


def test_the_order_in_which_images_are_scored_does_not_matter(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    assert figures_of(inputs, read, 1) == figures_of(inputs, read, 8)


def test_the_chosen_threshold_is_scored_exactly_and_the_oracle_is_never_much_worse(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    threshold = figures_of(inputs, read)["threshold"]
    assert threshold["miou_at_oracle"] >= threshold["miou_at_chosen"] - 0.02


def test_without_truth_the_figures_that_need_none_are_given_and_said_to_be_such(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, with_truth=0)
    found = figures_of(inputs, read)
    assert found["truth"] is False and "no ground truth" in found["note"]
    assert "miou" not in found["stages"]["pseudo_masks"] and found["stages"]["pseudo_masks"]["coverage"] > 0


def test_a_methods_own_decoder_has_a_row_for_each_split(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, decoder=True)
    stages = figures_of(inputs, read)["stages"]
    assert stages["decoder"]["miou"] == stages["decoder_val"]["miou"] == 1.0  # the toy's decoder says the truth
    assert (stages["decoder"]["split"], stages["decoder_val"]["split"]) == ("train", "val")
    assert stages["decoder"]["confidence"] is None


def test_a_stage_that_is_worse_than_the_one_before_is_told(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, decoder=True)
    found = figures_of(inputs, read)
    lost = run_metrics.miou_drops(found)
    assert ("decoder_val", "predictions") in {(before, after) for before, after, _, _ in lost}
    assert ("score_maps", "decoder") not in {(before, after) for before, after, _, _ in lost}
    assert (
        run_metrics.miou_drops(
            {"stages": {"score_maps": {"miou": 0.5}, "refined": {"miou": None}, "pseudo_masks": {"miou": 0.6}}}
        )
        == []
    )


def test_partial_truth_is_counted(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, with_truth=2)
    stage = figures_of(inputs, read)["stages"]["pseudo_masks"]
    assert (stage["images"], stage["images_with_truth"]) == (5, 2)


def test_figures_of_cross_validate_stand_in_the_rows_of_the_pseudo_masks_alone(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    for row in audit_of(tallied(inputs, read)).rows:
        index, values = int(row.id[0]), dict(zip(indicators.INDICATORS, row.indicators, strict=True))
        if row.stage == "pseudo_masks" and index:
            assert values["held_out"] == np.float32(index / 10) and np.isnan(values["held_out_agreement"])
        else:
            assert np.isnan(values["held_out"]) and np.isnan(values["held_out_agreement"])


def test_what_the_segmenter_sees_in_train_images_is_a_stage_after_the_pseudo_masks(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, relabelled=True)
    figures = figures_of(inputs, read)
    assert figures["stages"]["relabelled"]["miou"] == 1 > figures["stages"]["pseudo_masks"]["miou"]
    flow = next(flow for flow in figures["flow"] if flow["to"] == "relabelled")
    assert flow["from"] == "pseudo_masks" and figures["indicators"]["relabelled"].keys().isdisjoint(
        {"separation", "held_out"}
    )
    assert "relabelled" in headline(figures)["miou"] and "relabelled" not in headline(figures)["coverage"]
    audit = audit_of(tallied(inputs, read))
    pictures = dict(gallery.items(gallery.gallery_images(audit, read, 8), inputs))
    at = stage_order.GALLERY.index("relabelled")
    assert {image_id: item["present"][at] for image_id, item in pictures.items()} == {
        record.id: int(record.split == "train") for record in read
    }


def test_masks_that_a_person_corrected_are_counted(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, with_truth=2)
    assert "corrected_by_hand" not in figures_of(inputs, read)
    (inputs.pseudo_masks / "corrections.json").write_text('{"corrected": 3, "images": {}}', encoding="utf-8")
    assert figures_of(inputs, read)["corrected_by_hand"] == 3


@pytest.mark.parametrize("with_truth", [8, 0])
def test_the_page_is_self_contained_and_shows_names_as_text_only(tmp_path: Path, with_truth: int) -> None:
    inputs, read = build(tmp_path, with_truth=with_truth, relabelled=True)
    audit = audit_of(tallied(inputs, read))
    images = gallery.gallery_images(audit, read, SETTINGS.gallery)
    store.write_part(
        tmp_path / "gallery" / "cam.h5", store.GALLERY, gallery.items(images, inputs), labels=LABELS, part=0, parts=1,
        params_digest="", compression="none",
    )  # fmt: skip
    panels = np.frombuffer(b"photograph,<i>fine_map", np.uint8)
    weights = np.array([[0.25, 1.0]], np.float32)
    item = store.empty(store.INSPECTION) | {"jpeg": np.zeros(3, np.uint8), "panels": panels, "weights": weights}
    store.write_part(
        tmp_path / "inspection" / "cam.h5", store.INSPECTION, [(read.images[0].id, item)], labels=LABELS, part=0, parts=1,
        params_digest="", compression="none",
    )  # fmt: skip
    figures = summary(audit, inputs, read, "digest")
    records.write(tmp_path / "records.h5", read)
    figures["data"]["records"] = store.file_digest(tmp_path / "records.h5")
    write_tables(audit, figures, read, outs_of(tmp_path))
    (tmp_path / "audit" / "cam.json").write_text(json.dumps(figures), encoding="utf-8")
    (tmp_path / "audit" / "cam.h5").write_bytes(b"")  # small masks, of no use where there is one run
    path = page.write(tmp_path / "report", page_case.inputs_of(tmp_path), ["cam"], Report("A & B", "voc", 3))
    text = path.read_text(encoding="utf-8")
    assert "0.25" in text and "1.00" in text and "fine map" in text
    assert text.count("<script>") == 1 and "alert(1)</script>" not in text and "&lt;script&gt;" in text
    assert "<b>" not in text and "<i>" not in text
    assert 'colspan="4">split train, tags given' in text  # score maps, refined, pseudo-masks, relabelled
    assert "A &amp; B" in text and "größe" in text and "broken &amp; bent" in text
    assert "http" not in text.replace("http-equiv", "") and text.count('"photograph":') == 6
    if not with_truth:
        assert "empty tags" in text and "with reasons" in text and "<small class=" in text


def test_metrics_of_a_run_that_has_not_been_made_are_missed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weaktr\.json is missing"):
        run_metrics.read(tmp_path, ["weaktr"])


@pytest.mark.parametrize(
    ("header", "difference"),
    [
        ({}, "has no version"),
        ({"schema": "metrics", "version": 1}, "has schema metrics version 1"),
        ({"schema": "other", "version": metrics_file.VERSION}, "has schema other version 3"),
    ],
)
def test_metrics_of_another_version_are_refused_with_the_version_expected(
    tmp_path: Path, header: dict[str, Any], difference: str
) -> None:
    (tmp_path / "cam.json").write_text(json.dumps(header | {"stages": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"cam\.json {difference}, expected is schema figures version 3; run `dvc repro"):
        run_metrics.read(tmp_path, ["cam"])


def test_metrics_begin_with_their_schema_and_version(tmp_path: Path) -> None:
    assert list(figures_of(*build(tmp_path)).items())[:2] == [("schema", "figures"), ("version", 3)]


@pytest.mark.parametrize("with_truth", [8, 0])
def test_the_headline_has_a_dozen_numbers(tmp_path: Path, with_truth: int) -> None:
    found = headline(figures_of(*build(tmp_path, with_truth=with_truth)))
    leaves = [leaf for value in found.values() for leaf in (value.values() if isinstance(value, dict) else [value])]
    assert 5 <= len(leaves) <= 15 and all(isinstance(leaf, int | float) for leaf in leaves)
    assert ("miou" in found) == ("regret" in found) == bool(with_truth)
    assert found["with_reasons"].keys() == found["coverage"].keys() == {"pseudo_masks", "predictions"}


def test_the_fraction_of_images_with_reasons_is_that_of_the_rows(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    audit = audit_of(tallied(inputs, read))
    figures = summary(audit, inputs, read, "digest")
    write_tables(audit, figures, read, outs_of(tmp_path))
    with (tmp_path / "audit" / "cam.csv").open(encoding="utf-8", newline="") as file:
        reasons = [row["reasons"] for row in csv.DictReader(file) if row["stage"] == "pseudo_masks"]
    assert figures["stages"]["pseudo_masks"]["with_reasons"] == sum(map(bool, reasons)) / len(reasons)


def test_metrics_are_plain_json_without_nan(tmp_path: Path) -> None:
    inputs, read = build(tmp_path)
    json.dumps(figures_of(inputs, read), allow_nan=False)


@pytest.mark.parametrize("stage", ["prepare", "export", "evaluate", "report", "refine", "fit_refiner"])
def test_stages_without_model_work_do_not_import_torch(stage: str) -> None:
    code = f"import sys, stages.{stage}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


def test_records_survive_writing_and_reading(tmp_path: Path) -> None:
    _, read = build(tmp_path)
    records.write(tmp_path / "records.h5", read)
    assert records.read(tmp_path / "records.h5") == read
    wanted = {read.images[0].id, read.images[6].id}
    some = records.read(tmp_path / "records.h5", wanted)
    assert some.images == (read.images[0], read.images[6]) and (some.labels, some.skipped) == (read.labels, read.skipped)
