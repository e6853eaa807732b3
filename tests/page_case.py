"""A run's results written straight through the stores, without any model: what the report is made from."""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import metrics_file, stage_order
from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Report
from pipeline.report import page

SIZE = (24, 32)
PANELS = np.frombuffer(b"photograph,map", np.uint8)
TRAIN, VAL = ("score_maps", "refined", "pseudo_masks"), ("score_maps_val", "predictions")


def encoded(kind: str, mode: str) -> np.ndarray:
    out = io.BytesIO()
    Image.new(mode, SIZE[::-1], 128 if mode == "L" else (90, 140, 90)).save(out, kind)
    return np.frombuffer(out.getvalue(), np.uint8)


def packed(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(zlib.compress(values.astype(np.uint8).tobytes()), np.uint8)


def masks_of(at: int, stages: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """truth u8[h,w] with one block of a class, and u8[stages,h,w]: each stage finds more of it, beside a row of 255."""
    truth = np.zeros(SIZE, np.uint8)
    truth[4:20, 4:28] = at % classes + 1
    found = np.zeros((stages, *SIZE), np.uint8)
    for stage in range(stages):
        found[stage, 4:20, 4 : 10 + 6 * stage] = at % classes + 1
    found[-1, 0] = 255
    return truth, found


def item_of(at: int, split: str, photograph: np.ndarray, scores: np.ndarray, classes: int, truth: bool) -> dict[str, Any]:
    present = np.array(
        [name in (TRAIN if split == "train" else ("score_maps", "predictions")) for name in stage_order.GALLERY]
    )
    true, maps = masks_of(at, int(present.sum()), classes)
    miou = (
        np.where(present, (at * 7 % 100) / 100 - 0.01 * np.arange(len(present)), np.nan)
        if truth
        else np.full(len(present), np.nan)
    )
    return {
        "kind": np.array([1 + at % 3], np.uint8), "size": np.array(SIZE, np.uint16), "photograph": photograph,
        "scores": scores, "confidence": scores,
        "present": present.astype(np.uint8), "maps": packed(maps), "truth": packed(true) if truth else np.zeros(0, np.uint8),
        "miou": miou.astype(np.float32),
    }  # fmt: skip


def figures(labels: LabelSpace, truth: bool, records_digest: str) -> dict[str, Any]:
    """audit/<run>.json with every key that the page knows, or those without truth."""
    names = ["background", *labels.names]
    stages = {}
    for at, stage in enumerate((*TRAIN, *VAL)):
        one: dict[str, Any] = {
            "split": "train" if stage in TRAIN else "val", "images": 3, "images_with_truth": 3 * truth, "coverage": 0.2,
            "ignored": 0.01,
            "confidence": 0.8, "tagged_classes_without_pixels": 0.1, "with_reasons": 0.5,
        }  # fmt: skip
        if truth:
            rates = {"iou": 0.5, "precision": 0.7, "recall": 0.6, "over_activation": 0.2, "under_activation": 0.3}
            one |= {name: value for name, value in rates.items() if name != "iou"}
            one |= {"miou": 0.5 + 0.02 * at, "pixel_accuracy": 0.8 + 0.02 * at, "classes": dict.fromkeys(names, rates)}
            one |= {"boundary_iou": 0.4, "trimap_iou": 0.45, "protocols": {"excluded": 0.5, "miss": 0.4}}
            one |= {"interval": {"miou": [0.45, 0.6], "classes": {name: [0.4, 0.6] for name in names}}}
            one |= {"calibration": {"bins": [[0.3, 0.2, 0.4], [0.9, 0.8, 0.6]], "ece": 0.1}}
        stages[stage] = one
    found: dict[str, Any] = metrics_file.HEADER | {
        "truth": truth, "data": {"records": records_digest, "ids": "i", "classes": "c"},
        "protocol": {"predicted_255": "background", "mean": "over classes"}, "images": {"train": 3,
        "val": 2, "skipped": 0},
        "threshold": {"chosen": 0.4}, "stages": stages,
    }  # fmt: skip
    if not truth:
        return found | {"note": "There is no ground truth."}
    step = {"corrected": 0.03, "broken": 0.01}
    return found | {
        "background_only": {"train": 0.1, "val": 0.1},
        "threshold": {"chosen": 0.4, "oracle": 0.5, "miou_at_chosen": 0.5, "miou_at_oracle": 0.52, "regret": 0.02},
        "flow": [{"from": a, "to": b, **step, "images": 3, "images_corrected": 2, "images_broken": 1,
        "classes": dict.fromkeys(names, step)}
                 for a, b in (TRAIN[:2], TRAIN[1:], VAL)],
        "indicators": {"refined": {"entropy": 0.2, "edges": 0.7}, "pseudo_masks": {"entropy": 0.3}},
        "limits": {"refined": {"entropy": [None, 0.625], "edges": [0.375, None]}},
        "co_occurrence": [{"class": names[1], "with": names[-1], "images": 7, "share_with": 0.25, "share_without": 0.125}],
        "score": {"pseudo_masks": {"spearman": 0.6, "images": 3}},
    }  # fmt: skip


def write(
    root: Path,
    ids: Sequence[str],
    *,
    methods: Sequence[str] = ("cam", "weaktr"),
    labels: LabelSpace,
    truth: bool = True,
    palette: Any = "voc",
    dropped: Sequence[str] = (),
) -> Path:
    """Everything for `ids`, of which each fifth is in split val; root/report is made, and its index.html returned.

    dropped: ids that the gallery of the last method does not hold.
    """
    split = {i: "val" if at % 5 == 4 else "train" for at, i in enumerate(sorted(ids))}
    images = tuple(
        ImageRecord(i, f"{at}.png", SIZE, split[i], (at % len(labels),), bytes(32)) for at, i in enumerate(sorted(ids))
    )
    read = Records(labels, images, (("gone", "broken"),))
    records.write(root / "records.h5", read)
    photograph, scores = encoded("WEBP", "RGB"), encoded("JPEG", "L")
    for name in ("metrics", "audit"):
        (root / name).mkdir(parents=True, exist_ok=True)
    values = figures(labels, truth, store.file_digest(root / "records.h5"))
    for number, method in enumerate(methods):
        (root / "audit" / f"{method}.json").write_text(json.dumps(values), encoding="utf-8")
        (root / "plots" / method).mkdir(parents=True, exist_ok=True)
        curve = "0.0,0.3\n0.5,0.52\n0.9,0.1\n" if truth else ""
        (root / "plots" / method / "threshold.csv").write_text("threshold,miou\n" + curve, encoding="utf-8")
        items = (
            (one.id, item_of(at + number, one.split, photograph, scores, len(labels), truth))
            for at, one in enumerate(images)
            if method != methods[-1] or one.id not in dropped
        )
        inner = store.empty(store.INSPECTION) | {"jpeg": encoded("JPEG", "RGB"), "panels": PANELS}
        widths = ((at, 1 + (at * (number + 1) + number) % 4, one.id) for at, one in enumerate(images))
        last = ((i, {"mask": masks_of(at, wide, len(labels))[1][-1]}) for at, wide, i in widths)  # methods differ, by image
        for folder, schema, rows in (
            ("audit", store.SMALL_MASKS, last),
            ("gallery", store.GALLERY, items),
            ("inspection", store.INSPECTION, [(images[0].id, inner)]),
        ):
            store.write_part(root / folder / f"{method}.h5", schema, rows, labels=labels, part=0, parts=1, params_digest="",
                             compression="none")  # fmt: skip
        with (root / "audit" / f"{method}.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["id", "split", "stage", "tags", "truth", "miou", "score", "reasons", "entropy"])
            for at, one in enumerate(images):
                for stage in TRAIN if one.split == "train" else VAL:
                    rows.writerow(
                        [
                            one.id,
                            one.split,
                            stage,
                            "?",
                            int(truth),
                            "",
                            (at % 10) / 10,
                            "leak|empty_tag" if at % 2 else "",
                            0.1,
                        ]
                    )
    return page.write(root / "report", inputs_of(root), methods, Report("A title", palette, 5))


def inputs_of(root: Path) -> page.Inputs:
    folders = (root / name for name in ("audit", "metrics", "plots", "gallery", "inspection"))
    return page.Inputs(root / "records.h5", *folders)
