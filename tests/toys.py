"""Toy data sets of 64 px, drawn in the test's own folder, and params to go with them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pipeline.core import sections

PROJECT = Path(__file__).resolve().parents[1]
CLASSES = ("disc", "square")
FOLDER = {"images": "images", "tags": None, "classes": None, "val_share": 0.2}  # dataset.options
SCRATCH = PROJECT / "data" / "weights" / "scratch.txt"


def toy_image(index: int, side: int = 64) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A red disc, a blue square or both on green noise: image u8[side,side,3], mask, tags."""
    rng = np.random.default_rng(index)
    image = rng.integers(0, 60, (side, side, 3), dtype=np.uint8)
    image[..., 1] += 100
    mask = np.zeros((side, side), np.uint8)
    y, x = np.mgrid[:side, :side]
    tags = []
    if index % 3 != 1:
        disc = (y - side * 0.3) ** 2 + (x - side * 0.3) ** 2 < (side * 0.22) ** 2
        image[disc], mask[disc] = (220, 30, 30), 1
        tags.append("disc")
    if index % 3 != 0:
        square = (abs(y - side * 0.7) < side * 0.2) & (abs(x - side * 0.65) < side * 0.2)
        image[square], mask[square] = (30, 30, 220), 2
        tags.append("square")
    return image, mask, tags


def toy_folder(root: Path, *, train: int = 9, val: int = 3, side: int = 64, masks: bool = True) -> Path:
    """A data set in the layout of datasets/folder.py."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    with (root / "tags.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "tags", "split"])
        for index in range(train + val):
            image, mask, tags = toy_image(index, side + 8 * (index % 2))
            name = f"{'train' if index < train else 'val'} {index:03d}"
            Image.fromarray(image).save(root / "images" / f"{name}.png")
            if masks:
                Image.fromarray(mask).save(root / "masks" / f"{name}.png")
            rows.writerow([name, " ".join(tags), name.split()[0]])
    return root


def toy_recipe(method: str) -> dict[str, Any]:
    """recipes/scenes/<method>.yaml, cut down to toys: the same sections, a few steps."""
    recipe = yaml.safe_load((PROJECT / "recipes" / "scenes" / f"{method}.yaml").read_text(encoding="utf-8"))
    for section in ("train", "retrain"):
        part = recipe[section]
        part["augment"]["size"] = 64
        part["model"]["image_size"] = 64
        inner = [value for value in part["model"].values() if isinstance(value, dict) and "schedule" in value]
        for scheduled in (part, *inner):  # a method may have schedules of further phases
            scheduled["schedule"] |= {"epochs": 1, "min_steps": 0, "batch_size": 4, "shards": 2, "warmup": 0}
    recipe["extract"] |= {"images_per_part": 4, "scales": [1.0], "inspect": 2}
    recipe["refine"]["images_per_part"] = 4
    recipe["segment"] |= {"images_per_part": 2, "scales": [1.0], "window": 64, "window_stride": 64, "short_side": None}
    return recipe


def smp_model(
    decoder: str = "fpn", encoder: str = "tu-test_resnet", options: dict[str, Any] | None = None, norm: str = "group"
) -> dict[str, Any]:
    """retrain.model of segmenter smp, as small as its package allows."""
    small = {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 64, "decoder_dropout": 0.0}
    return {
        "decoder": decoder, "encoder": encoder, "depth": 5, "norm": norm,
        "decoder_options": small if options is None else options, "encoder_lr_factor": 0.5, "balance": "pixels",
    }  # fmt: skip


class Toy:
    """params.yaml and the recipes of its runs, which are called as their methods; to be changed, and written into a
    folder."""

    def __init__(self, root: Path, methods: Sequence[str] = ("cam",)) -> None:
        self.params = yaml.safe_load((PROJECT / "presets" / "scenes-all.yaml").read_text(encoding="utf-8"))
        self.params["dataset"] = {"name": "folder", "root": str(root), "options": dict(FOLDER)}
        known = self.params["methods"]  # a method that no preset names runs on a ViT
        self.params["methods"] = {key: known.get(key, {**known["cam"], "method": key}) for key in methods}
        self.recipes = {key: toy_recipe(key) for key in methods}
        for key, run in self.params["methods"].items():
            run |= {"recipe": f"recipes/{key}.yaml", "init": str(SCRATCH), "segmenter_init": str(SCRATCH)}

    def write(self, folder: Path) -> None:
        """params.yaml and recipes/<run>.yaml."""
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        (folder / "params.yaml").write_text(yaml.safe_dump(self.params, sort_keys=False), encoding="utf-8")
        for key, recipe in self.recipes.items():
            (folder / "recipes" / f"{key}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")

    def settings(self, key: str = "cam") -> sections.Settings:
        """Of one run, without files."""
        run = sections.Run(**self.params["methods"][key])
        return sections.Settings(key, run, sections.dataset(self.params), self.params, self.recipes[key])


def learned_fit(architecture: str, crf: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Section fit_refiner of the refiners that fit more than a threshold, cut down to toys. architecture: of the run's
    backbone family."""
    training = {
        "seed": 0,
        "precision": "fp32",
        "augment": {
            "size": 64, "scale_min": 0.8, "scale_max": 1.2, "area_min": None, "flip": 0.5, "jitter": 0.2,
            "rand_augment": None,
            "erase": 0.0,
        },
        "schedule": {
            "epochs": 1, "min_steps": 0, "batch_size": 4, "shards": 2, "lr": 0.01, "weight_decay": 0.0001,
            "optimiser": "adamw", "schedule": "poly", "warmup": 0, "lr_floor": 0.0,
        },
    }  # fmt: skip
    base = {"architecture": architecture, "image_size": 64}
    level = {"threshold": {"rule": "fixed", "value": 0.3}}
    return {
        "segments": level | {"segments": {"source": "felzenszwalb", "scale": 50.0, "sigma": 0.8, "min_size": 8}},
        "affinitynet": level
        | training
        | {
            "labels": {"powers": [2, 8], "crf": crf},
            "model": base | {"stride": 8, "widths": [4, 6], "radius": 3, "backbone_lr_factor": 0.1},
        },
        "irn": level
        | training
        | {
            "labels": {"factors": [0.5, 2.0], "gt_prob": 0.7, "crf": crf},
            "model": base | {"stride": 4, "radius": 4, "displacement_weight": 1.0, "displacement_lr_factor": 10.0},
        },
    }
