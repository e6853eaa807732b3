"""Pseudo-masks of stage export → readers for other training code, for supervision and for FiftyOne. No stage of the DAG
imports them (docs/pseudo_masks.md, docs/exports.md)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.core import records, store
from pipeline.core.labels import BACKGROUND, IGNORE, LabelSpace
from pipeline.core.records import ImageRecord, Records, file_stem
from pipeline.stage_order import LAST

if TYPE_CHECKING:
    from torch import Tensor


class PseudoMasks:
    """`masks[id]` → u8[h,w] mask values: 0 background, i + 1 = labels.names[i], 255 ignore. Iterates over its sorted ids.

    folder is artifacts/<run>/pseudo_masks. StoreError where it is no complete store, or holds no such id.
    """

    def __init__(self, folder: Path | str) -> None:
        self._store = store.Store(Path(folder), store.PSEUDO_MASKS)
        self.ids = self._store.ids
        self.labels = self._store.labels

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __getitem__(self, image_id: str) -> np.ndarray:
        return self._store.read(image_id, "mask")


class PseudoMaskDataset:
    """A map-style data set for torch's DataLoader; item i is (u8[3,h,w] RGB, u8[h,w] mask values as in PseudoMasks), by id.

    records_file is data/records.h5, masks_folder artifacts/<run>/pseudo_masks, root the params' dataset.root.
    Sizes differ from image to image: crop or pad before batching. ValueError if a mask has no record.
    """

    def __init__(self, records_file: Path, masks_folder: Path, root: Path) -> None:
        self.root = Path(root)
        self._masks = PseudoMasks(masks_folder)
        by_id = records.read(Path(records_file)).by_id()
        unknown = [image_id for image_id in self._masks.ids if image_id not in by_id]
        if unknown:
            raise ValueError(f"{len(unknown)} masks of {masks_folder} are not in {records_file}: {unknown[:5]}")
        self._records = [by_id[image_id] for image_id in self._masks.ids]
        self.ids = self._masks.ids
        self.labels = self._masks.labels

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        import torch  # PseudoMasks is read without it

        record = self._records[index]
        image = np.array(records.read_image(record, self.root).transpose(2, 0, 1), order="C")
        return torch.from_numpy(image), torch.from_numpy(self._masks[record.id])


def to_supervision(mask: np.ndarray, labels: LabelSpace, confidence: np.ndarray | None = None) -> Any:
    """u8[h,w] mask values → supervision.Detections: one per class, by class; 0 and 255 are none. Needs the package.

    class_id is the class index from 0, data["class_name"] its name. confidence: u8[h,w] (of 255) or f32[h,w] in 0..1, as
    stores hold it or not; a detection's is the mean over its pixels.
    """
    _require("supervision")
    import supervision  # pyright: ignore[reportMissingImports]

    values = [value for value in np.unique(mask).tolist() if value not in (BACKGROUND, IGNORE)]
    if not values:
        return supervision.Detections.empty()
    masks = np.stack([mask == value for value in values])
    mean = None
    if confidence is not None:
        scale = store.CONFIDENCE_STEPS if confidence.dtype == np.uint8 else 1.0
        mean = np.array([confidence[region].mean(dtype=np.float64) / scale for region in masks], np.float32)
    return supervision.Detections(
        xyxy=supervision.mask_to_xyxy(masks).astype(np.float32),
        mask=masks,
        confidence=mean,
        class_id=np.array(values) - 1,
        data={"class_name": np.array([labels.names[value - 1] for value in values])},
    )


def to_fiftyone(
    name: str, *, records_file: Path, masks_folder: Path, root: Path, out: Path, predictions_folder: Path | None = None,
    audit_file: Path | None = None, overwrite: bool = False, persistent: bool = True,
) -> Any:  # fmt: skip
    """All images of a run → a FiftyOne data set `name`, sample by sample. Needs the package and its MongoDB.

    root                dataset.root of the params
    out                 folder to write masks into, as greyscale PNGs of mask values: FiftyOne's database names files
    predictions_folder  of stage segment, for split val
    audit_file          audit/<run>.csv, for score and reasons
    overwrite           replaces a data set of that name; without it, ValueError
    persistent          keeps the data set after the session

    Fields: tag2mask_id, image_tags (Classifications; None on untagged images), pseudo_mask and prediction (Segmentation),
    and, of the image's last mask, score (0..1), reasons and, where there is truth, miou (0..1). Sample tags are the split,
    and `corrected` where a person corrected the mask.
    """
    _require("fiftyone")
    import fiftyone as fo  # pyright: ignore[reportMissingImports]

    listed = records.read(Path(records_file))
    stores = {"pseudo_mask": (store.Store(Path(masks_folder), store.PSEUDO_MASKS), "mask")}
    if predictions_folder is not None:
        stores["prediction"] = (store.Store(Path(predictions_folder), store.PREDICTIONS), "label")
    try:
        exists = fo.dataset_exists(name)
    except Exception as error:  # of FiftyOne, of its MongoDB or of the driver
        raise ValueError(f"FiftyOne cannot reach its database: {error}") from error
    if exists and not overwrite:
        raise ValueError(f"FiftyOne has a data set {name!r} already; overwrite it, or choose another name")
    if any(record.length is not None for record in listed):
        raise ValueError(
            "the images lie in tar shards, and FiftyOne shows files: unpack the shards, and use data set `folder`"
        )
    dataset = fo.Dataset(name, overwrite=overwrite, persistent=persistent)
    dataset.default_classes = list(listed.labels.names)
    dataset.default_mask_targets = {**dict(enumerate(listed.labels.names, 1)), IGNORE: "ignore"}
    for field, kind in (("tag2mask_id", fo.StringField), ("score", fo.FloatField), ("miou", fo.FloatField)):
        dataset.add_sample_field(field, kind)
    dataset.add_sample_field("reasons", fo.ListField, subfield=fo.StringField)
    dataset.add_sample_field("image_tags", fo.EmbeddedDocumentField, embedded_doc_type=fo.Classifications)
    for field in stores:
        dataset.add_sample_field(field, fo.EmbeddedDocumentField, embedded_doc_type=fo.Segmentation)
    corrected = _corrected(Path(masks_folder))
    rows = {} if audit_file is None else _last_rows(Path(audit_file))

    def sample(record: ImageRecord) -> Any:
        made = fo.Sample(
            filepath=str((Path(root) / record.path).resolve()),
            tags=[record.split, *(["corrected"] if record.id in corrected else [])],
            metadata=fo.ImageMetadata(width=record.size[1], height=record.size[0]),
            tag2mask_id=record.id,
            image_tags=_classifications(record, listed, fo),
            **rows.get(record.id, {}),
        )
        for field, (masks, of_store) in stores.items():
            if record.id in masks:
                path = Path(out).resolve() / field / f"{file_stem(record.id)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(masks.read(record.id, of_store)).save(path)
                made[field] = fo.Segmentation(mask_path=str(path))
        return made

    dataset.add_samples(map(sample, listed), num_samples=len(listed))
    return dataset


def _classifications(record: ImageRecord, listed: Records, fo: Any) -> Any:
    if record.tags is None:
        return None
    return fo.Classifications(classifications=[fo.Classification(label=listed.labels.names[tag]) for tag in record.tags])


def _corrected(masks_folder: Path) -> set[str]:
    """Ids of the images whose masks a person corrected."""
    path = masks_folder / store.CORRECTED
    return set(json.loads(path.read_text(encoding="utf-8"))["images"]) if path.is_file() else set()


def _last_rows(audit_file: Path) -> dict[str, dict[str, Any]]:
    """score, reasons and miou of the image's last mask, by id; what a row lacks is left out."""
    rows = {}
    with audit_file.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["stage"] == LAST[row["split"]]:
                numbers = {column: float(row[column]) for column in ("score", "miou") if row[column]}
                rows[row["id"]] = {**numbers, "reasons": [reason for reason in row["reasons"].split("|") if reason]}
    return rows


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise ValueError(f"{package} is missing: pip install 'tag2mask[{package}]' (or pip install {package})")
