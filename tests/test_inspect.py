"""Inner maps for the report: the same images whatever the order, every map as a panel, weights by layer and head."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.core import config, plugins, store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord
from pipeline.imaging import sheet
from pipeline.jobs import inspect
from pipeline.training.settings import Schedule
from tests.toys import toy_folder, toy_recipe
from tests.training_case import records_of

LABELS = LabelSpace(("disc", "square"))


def record(name: str, split: str, tags: tuple[int, ...] | None) -> ImageRecord:
    return ImageRecord(name, "", (8, 8), split, tags, b"")


def test_the_same_tagged_training_images_are_shown_whatever_their_order() -> None:
    images = [record(f"i{n}", "train", (n % 2,)) for n in range(20)]
    others = [record("val", "val", (0,)), record("untagged", "train", None), record("nothing", "train", ())]
    first, second = inspect.chosen(images + others, 5), inspect.chosen((images + others)[::-1], 5)
    assert first == second and len(first) == 5 and first == sorted(first, key=lambda one: one.id)
    assert {one.id for one in first} <= {one.id for one in images}
    assert inspect.chosen(others, 5) == [] and len(inspect.chosen(images, 99)) == 20


@pytest.mark.parametrize(
    ("name", "panels", "weights"),
    [("cam", ["photograph", "class_map"], (0, 0)), ("weaktr", ["photograph", "coarse", "cross", "fused", "fine"], (4, 4))],
)
def test_every_map_of_a_method_becomes_a_panel(
    tmp_path: Path, name: str, panels: list[str], weights: tuple[int, int]
) -> None:
    root = toy_folder(tmp_path / "raw", train=4, val=0)
    module = plugins.load("methods", name)
    model = toy_recipe(name)["train"]["model"]
    torch.manual_seed(0)
    schedule = Schedule(1, 0, 2, 1, 1e-3, 0.0, "adamw", "poly", 0, 0.0)
    method = module.Method(LABELS, config.parse(module.Params, model, "model"), schedule, plugins.load("nn", "vit")).eval()
    items = inspect.inspections(inspect.chosen(records_of(root), 3), method, 2, root, None, "cpu")
    path = tmp_path / "inspection.h5"
    store.write_part(
        path, store.INSPECTION, items, labels=LABELS, part=0, parts=1, params_digest="", compression="none"
    )  # fmt: skip
    found = list(store.Store(path, store.INSPECTION))
    assert len(found) == 3
    for _, item in found:
        assert item["panels"].tobytes().decode().split(",") == panels
        picture = Image.open(io.BytesIO(item["jpeg"].tobytes()))
        assert picture.height == inspect.HEIGHT and picture.width >= len(panels) * inspect.HEIGHT
        assert item["weights"].shape == weights


def test_a_strip_holds_its_panels_side_by_side_and_bounds_wide_images() -> None:
    red, blue = np.zeros((10, 20, 3), np.uint8), np.zeros((10, 20, 3), np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    found = np.asarray(Image.open(io.BytesIO(sheet.strip([red, blue], 16, smooth=1)))).astype(int)
    assert found.shape == (16, 2 * 32 + sheet.GAP, 3)
    assert found[8, 10, 0] > 200 > found[8, 10, 2] and found[8, 60, 2] > 200 > found[8, 60, 0]
    panorama = np.asarray(Image.open(io.BytesIO(sheet.strip([np.zeros((2, 900, 3), np.uint8)], 16, smooth=1))))
    assert panorama.shape == (16, 16 * sheet.MAX_ASPECT, 3)
