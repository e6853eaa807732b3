"""A small project folder for the tests of fit_refiner, refine and export: images, records, score maps, params.yaml, a
recipe."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from stages import export, fit_refiner, refine
from tests.toys import SCRATCH, Toy, learned_fit

LABELS = LabelSpace(("boat", "car", "sheep"))
CRF = {
    "iterations": 3, "gaussian_sxy": 3, "gaussian_compat": 3, "bilateral_sxy": 20,
    "bilateral_srgb": 5, "bilateral_compat": 10,
}  # fmt: skip
SETTINGS = {"scale": 0.5, "dilations": [1, 2, 4], "iterations": 3, "w1": 0.3, "w2": 0.01}
PAR = {"planes": "softmax", "par": SETTINGS}
WALK = {"planes": "share", "radius": 2, "power": 2.0, "eps": 0.01, "par": SETTINGS}
AFFINITYNET = {"power": 4.0, "beta": 4.0, "steps": 8, "long_side": 512}
IRN = {"radius": 3, "beta": 4.0, "steps": 8, "flip": True, "normalise": "class", "threshold": None, "long_side": 512}
SEGMENTS = {"normalise": "minmax", "power": None, "uncovered": "scores"}
OPTIONS = {
    "crf": {"unary": "soft", "gt_prob": 0.7, "sharpness": 1.0, "crf": CRF}, "none": {}, "par": PAR, "walk": WALK,
    "affinitynet": AFFINITYNET, "irn": IRN, "segments": SEGMENTS,
}  # fmt: skip
STORAGE = {"images_per_part": 2, "compression": "gzip"}

# id, (h, w), split, tags; the names and sizes that break things
IMAGES: list[tuple[str, tuple[int, int], str, tuple[int, ...] | None]] = [
    ("../up", (24, 20), "train", (0,)),
    ("a b", (17, 31), "train", (0, 2)),
    ("größe", (24, 20), "train", (1,)),
    ("one pixel", (1, 1), "train", (2,)),
    ("tagless", (9, 9), "train", ()),
    ("untagged", (12, 12), "train", None),
    ("val", (12, 12), "val", (1,)),
]


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """Cells of the affinity, at stride 8."""
    return -(-size[0] // 8), -(-size[1] // 8)


def affinity_of(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """f16[n,n], symmetric, in 0..1."""
    rows, columns = grid_of(size)
    half = rng.random((rows * columns, rows * columns))
    return ((half + half.T) / 2).astype(np.float16)


def scores_of(rng: np.random.Generator, k: int, size: tuple[int, int]) -> np.ndarray:
    """f16[k,gh,gw]: one bright block per class on a dark ground, at stride 4."""
    gh, gw = -(-size[0] // 4), -(-size[1] // 4)
    scores = rng.random((k, gh, gw)) * 0.2
    for plane in scores:
        top, left = rng.integers(0, gh), rng.integers(0, gw)
        plane[top : top + 3, left : left + 3] = rng.uniform(0.7, 1)
    return scores.astype(np.float16)


def fit_params(refiner: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Section fit_refiner; a learned refiner's network is small, on a ViT. changes: background, and whatever the refiner
    has."""
    settings = learned_fit("scenes_vit", CRF).get(refiner, {})
    settings |= {"threshold": {"rule": "fixed", "value": 0.4}}
    return settings | {name: value for name, value in changes.items() if name in settings}


def build(root: Path, **changes: Any) -> None:
    """Fills `root`; changes: those of fit_params, refiner, disagree_at, ignore_below, ignore_disagreement, formats."""
    rng = np.random.default_rng(0)
    (root / "raw").mkdir(parents=True)
    (root / "corrections").mkdir()
    found, maps = [], []
    for number, (image_id, size, split, tags) in enumerate(IMAGES):
        path = root / "raw" / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        sha256 = hashlib.sha256(path.read_bytes()).digest()
        found.append(records.ImageRecord(image_id, path.name, size, split, tags, sha256))
        classes = np.array((1,) if tags is None else tags, np.uint16)
        fields = {
            "classes": classes,
            "scores": scores_of(rng, len(classes), size),
            "agreement": np.full(len(classes), 0.5, np.float16),
            "tag_logits": np.zeros(len(LABELS), np.float32),
            "affinity": affinity_of(rng, size),
            "grid": np.array(grid_of(size), np.uint16),
            "decoded": np.zeros((0, 0), np.uint8),
        }
        maps.append((image_id, fields))
    records.write(root / "records.h5", records.Records(LABELS, tuple(found), ()))
    store.write_part(
        store.part_path(root / "scoremaps", 0), store.SCORE_MAPS, sorted(maps, key=lambda item: item[0]), labels=LABELS,
        part=0, parts=1, params_digest="", compression="gzip",
    )  # fmt: skip
    write_settings(root, **changes)


def write_settings(root: Path, **changes: Any) -> None:
    """params.yaml and the recipe; changes as in `build`."""
    refiner, toy = changes.get("refiner", "crf"), Toy(Path("raw"))
    toy.params["methods"]["cam"]["refiner"] = refiner
    toy.recipes["cam"]["fit_refiner"] = fit_params(refiner, changes)
    toy.recipes["cam"]["refine"] = {"disagree_at": changes.get("disagree_at"), "options": OPTIONS[refiner], **STORAGE}
    toy.params["export"] = {
        "ignore_below": changes.get("ignore_below", 0.0),
        "ignore_disagreement": changes.get("ignore_disagreement", False),
        "formats": changes.get("formats", ["hdf5"]),
        **STORAGE,
    }
    toy.write(root)


def run(stage: str) -> Result:
    """One stage in the current folder."""
    paths = {
        "fit_refiner": ["--scoremaps", "scoremaps", "--init", str(SCRATCH), "--refiner", "out/refiner.safetensors"],
        "refine": ["--scoremaps", "scoremaps", "--refiner", "out/refiner.safetensors", "--refined", "out/refined"],
        "export": [
            "--refined",
            "out/refined",
            "--corrections",
            "corrections",
            "--pseudo-masks",
            "out/pseudo_masks",
            "--exports",
            "out/exports",
        ],
    }
    command = {"fit_refiner": fit_refiner.main, "refine": refine.main, "export": export.main}[stage]
    return CliRunner().invoke(command, ["cam", "--records", "records.h5", *paths[stage]])


def run_well(*stages: str) -> None:
    for stage in stages:
        result = run(stage)
        assert result.exit_code == 0, (stage, result.output, result.exception)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
