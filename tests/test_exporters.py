"""Every export, read by its format's own reader, gives back the masks: exactly, or as far as losses.json says."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw

from pipeline import mask_files
from pipeline.core import plugins
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records, file_stem
from pipeline.exporters import coco_rle, cvat, hf_parquet, label_studio, voc_png, yolo_seg
from pipeline.imaging.palette import voc_palette
from pipeline.jobs import check, export
from tests.toys import PROJECT, Toy

LABELS = LabelSpace(("boat", 'car & "van"', "größe"))
SIZES = {
    "../up": (24, 20),
    "a b": (17, 31),
    "deep/er": (9, 40),
    "größe<script>": (24, 20),
    "one pixel": (1, 1),
    "wide": (1, 50),
}
TAGS: dict[str, tuple[int, ...] | None] = {"a b": (0, 2), "deep/er": (), "wide": None}
WRITTEN = plugins.available("exporters")
needs_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="pyarrow, of the extra parquet, is absent"
)
MASKS = arrays(
    np.uint8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.sampled_from([0, 0, 1, 1, 2, 3, 255])
)


def blobs(image_id: str, size: tuple[int, int]) -> np.ndarray:
    """Blobs of every value; the image `deep/er` is background alone."""
    if image_id == "deep/er":
        return np.zeros(size, np.uint8)
    rng = np.random.default_rng(len(image_id))
    coarse = rng.choice(np.array([0, 1, 2, 3, 255], np.uint8), (-(-size[0] // 4), -(-size[1] // 4)))
    return np.repeat(np.repeat(coarse, 4, 0), 4, 1)[: size[0], : size[1]].copy()


MASK_OF = {image_id: blobs(image_id, size) for image_id, size in SIZES.items()}
RECORDS = Records(
    LABELS,
    tuple(ImageRecord(i, f"images/{i}.jpg", size, "train", TAGS.get(i, (0, 1, 2)), b"") for i, size in SIZES.items()),
    (),
)


def stream() -> Iterator[tuple[str, np.ndarray]]:
    """An iterator, not a list: exporters may pass over masks once."""
    return iter(sorted(MASK_OF.items()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_masks_give_the_same_bytes_and_no_file_leaves_its_folder(name: str, tmp_path: Path) -> None:
    module = plugins.load("exporters", name)
    if name == "hf_parquet" and importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow, of the extra parquet, is absent")
    for run in ("first", "second"):
        module.write(stream(), RECORDS, tmp_path / run / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second") != {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]
    assert [path.name for path in (tmp_path / "first").iterdir()] == [name]


def test_coco_gives_back_every_mask_through_pycocotools(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    coco_rle.write(stream(), RECORDS, tmp_path)
    coco = COCO(str(tmp_path / "annotations.json"))
    assert [annotation["name"] for annotation in coco.loadCats(coco.getCatIds())] == [*LABELS.names, "ignore"]
    assert len(coco.imgs) == len(MASK_OF)
    for number, image in coco.imgs.items():
        mask = MASK_OF[image["tag2mask_id"]]
        assert image["file_name"] == f"images/{image['tag2mask_id']}.jpg"
        restored = np.zeros((image["height"], image["width"]), np.uint8)
        annotations: list[dict[str, Any]] = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        for annotation in annotations:
            region = coco.annToMask(annotation).astype(bool)
            assert not restored[region].any()
            restored[region] = annotation["category_id"]
            y, x = np.nonzero(region)
            assert annotation["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert annotation["area"] == region.sum()
            assert annotation["iscrowd"] == (annotation["category_id"] == 255)
        np.testing.assert_array_equal(restored, mask)
        assert len(annotations) == len(set(np.unique(mask).tolist()) - {0})


def test_no_image_at_all_is_still_a_coco_file(tmp_path: Path) -> None:
    coco_rle.write(iter(()), Records(LABELS, (), ()), tmp_path)
    content = json.loads((tmp_path / "annotations.json").read_text(encoding="utf-8"))
    assert content["images"] == content["annotations"] == [] and len(content["categories"]) == 4


def read_cvat(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The layout of https://docs.cvat.ai: label → colour, name → class values and object colours."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        lines = archive.read("labelmap.txt").decode("utf-8").splitlines()
        rows = [line.split(":") for line in lines if not line.startswith("#")]
        assert all(len(row) == 4 for row in rows)
        colours = {row[0]: tuple(map(int, row[1].split(","))) for row in rows}
        listed = archive.read("ImageSets/Segmentation/default.txt").decode("utf-8").splitlines()
        files = {
            name: np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist() if ".png" in name
        }
        assert sorted(files) == sorted(
            f"{folder}/{n}.png" for n in listed for folder in ("SegmentationClass", "SegmentationObject")
        )
        assert not [name for name in archive.namelist() if ".." in Path(name).parts or name.startswith("/")]
    return (
        colours,
        {n: files[f"SegmentationClass/{n}.png"] for n in listed},
        {n: files[f"SegmentationObject/{n}.png"] for n in listed},
    )


def test_cvat_gives_back_every_mask_by_the_colours_of_its_labelmap(tmp_path: Path) -> None:
    cvat.write(stream(), RECORDS, tmp_path)
    colours, classes, objects = read_cvat(tmp_path / cvat.ARCHIVE)
    values = {colours[name]: value for value, name in mask_files.plain_names(LABELS).items()}
    assert len(values) == len(LABELS) + 2
    assert "deep/er" in classes and "%2E./up" in classes
    for image_id, mask in MASK_OF.items():
        pixels = classes[mask_files.nested_stem(image_id)]
        restored = np.array([[values[tuple(pixel)] for pixel in row] for row in pixels.tolist()])
        np.testing.assert_array_equal(restored, mask)
        numbers = objects[mask_files.nested_stem(image_id)]
        for colour in {tuple(pixel) for row in numbers.tolist() for pixel in row} - {(0, 0, 0)}:
            assert len(np.unique(mask[(numbers == colour).all(-1)])) == 1  # an object has one class
    task_labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert [label["name"] for label in task_labels] == [*LABELS.names, "ignore"]


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_objects_are_the_connected_components_numbered_without_gaps(mask: np.ndarray) -> None:
    objects = cvat.objects(mask)
    assert ((objects == 0) == (mask == 0)).all()
    assert sorted(set(np.unique(objects).tolist()) - {0}) == list(range(1, len(np.unique(objects[objects > 0])) + 1))
    count = sum(len(mask_files.components(mask == value)[1]) for value in np.unique(mask).tolist() if value)
    assert objects.max(initial=0) == count
    for number in range(1, count + 1):
        assert len(mask_files.components(objects == number)[1]) == 1


def test_with_more_components_than_numbers_the_largest_keep_their_own() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[::2, ::2] = 1
    mask[1::4, 1::4] = 2
    mask[40:60, 40:60] = 1
    objects = cvat.objects(mask)
    assert objects.max() == 255 and ((objects == 0) == (mask == 0)).all()
    assert (objects == objects[50, 50]).sum() == 400
    for number in range(1, 256):
        assert len(np.unique(mask[objects == number])) == 1


def test_class_names_that_a_labelmap_cannot_hold_are_changed_or_refused() -> None:
    assert mask_files.plain_names(LabelSpace(("a:b", "#c", "background"))) == {
        0: "background (0)", 1: "a_b", 2: "_c", 3: "background", 255: "ignore"
    }  # fmt: skip
    with pytest.raises(ValueError, match="'a:b' and 'a_b' are both 'a_b'"):
        mask_files.plain_names(LabelSpace(("a:b", "a_b")))


@needs_pyarrow
def test_parquet_gives_back_every_mask_and_says_what_its_columns_are(tmp_path: Path) -> None:
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    hf_parquet.write(stream(), RECORDS, tmp_path)
    table = parquet.read_table(tmp_path / "data" / "train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == table.column_names == ["image_id", "file_name", "tags", "mask"]
    assert features["mask"] == {"_type": "Image"} and features["tags"]["feature"]["names"] == list(LABELS.names)
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows] == sorted(MASK_OF)
    for row in rows:
        with Image.open(io.BytesIO(row["mask"]["bytes"])) as picture:
            assert picture.mode == "P" and picture.getpalette() == voc_palette().ravel().tolist()
            np.testing.assert_array_equal(np.asarray(picture), MASK_OF[row["image_id"]])
        assert "/" not in row["mask"]["path"]
    assert {row["image_id"]: row["tags"] for row in rows} == {
        i: None if i == "wide" else [*TAGS.get(i, (0, 1, 2))] for i in MASK_OF
    }


@needs_pyarrow
def test_parquet_is_written_in_row_groups_so_that_memory_stays_flat(tmp_path: Path) -> None:
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    images = tuple(ImageRecord(f"{n:04d}", f"{n}.jpg", (2, 2), "train", (0,), b"") for n in range(250))
    hf_parquet.write(((record.id, np.zeros((2, 2), np.uint8)) for record in images), Records(LABELS, images, ()), tmp_path)
    metadata = parquet.ParquetFile(tmp_path / "data" / "train-00000-of-00001.parquet").metadata
    assert [metadata.row_group(n).num_rows for n in range(metadata.num_row_groups)] == [100, 100, 50]


def test_a_missing_pyarrow_is_reported_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_parquet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'tag2mask\[parquet\]'"):
        export.exporters(["hf_parquet"])
    monkeypatch.chdir(tmp_path)
    toy = Toy(Path("raw"))
    toy.params["export"]["formats"] = ["hdf5", "hf_parquet", "no_such", "voc_png", "voc_png"]
    toy.write(tmp_path)
    problems = "\n".join(check.problems())
    assert (
        "needs pyarrow" in problems
        and "no 'no_such' in pipeline/exporters" in problems
        and "'voc_png' stands twice" in problems
    )


def decode_brush(data: list[int]) -> np.ndarray:
    """Label Studio's RLE → values, bit by bit and literally as its decoder reads them; ours in the tests alone."""
    bits, at = np.unpackbits(np.array(data, np.uint8)), 0

    def read(width: int) -> int:
        nonlocal at
        at += width
        assert at <= len(bits)
        return int("".join(map(str, bits[at - width : at].tolist())), 2)

    count, word = read(32), read(5) + 1
    lengths = [read(4) + 1 for _ in range(4)]
    out: list[int] = []
    while len(out) < count:
        run = read(1)
        length = read(lengths[read(2)]) + 1
        out += [read(word)] * length if run else [read(word) for _ in range(length)]
    assert len(out) == count and len(bits) - at < 8
    return np.array(out, np.uint8)


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_a_brush_region_is_the_rgba_bytes_of_its_pixels(mask: np.ndarray) -> None:
    decoded = decode_brush(list(mask_files.brush_rle(mask == 1))).reshape(*mask.shape, 4)
    assert (decoded == np.where(mask == 1, 255, 0)[..., None]).all()


def test_runs_longer_than_sixteen_bits_are_cut() -> None:
    region = np.zeros((300, 300), bool)
    region[200:, :] = True
    decoded = decode_brush(list(mask_files.brush_rle(region))).reshape(300, 300, 4)
    assert ((decoded[..., 0] == 255) == region).all()


def test_label_studio_gives_back_every_mask(tmp_path: Path) -> None:
    label_studio.write(stream(), RECORDS, tmp_path)
    interface = ElementTree.parse(tmp_path / "labels.xml")
    labels = [element.attrib["value"] for element in interface.iter("Label")]
    assert labels == [*LABELS.names, "ignore"]
    values = dict(zip(labels, (1, 2, 3, 255), strict=True))
    names = {element.tag: element.attrib["name"] for element in interface.iter() if "name" in element.attrib}
    tasks = json.loads((tmp_path / "tasks.json").read_text(encoding="utf-8"))
    assert [task["data"]["tag2mask_id"] for task in tasks] == sorted(MASK_OF)
    for task in tasks:
        mask = MASK_OF[task["data"]["tag2mask_id"]]
        assert re.fullmatch(r"/data/local-files/\?d=[\w/.%-]+", task["data"]["image"])
        restored = np.zeros(mask.shape, np.uint8)
        for region in task["predictions"][0]["result"]:
            assert (region["from_name"], region["to_name"]) == (names["BrushLabels"], names["Image"])
            assert (region["original_height"], region["original_width"]) == mask.shape
            alpha = decode_brush(region["value"]["rle"]).reshape(*mask.shape, 4)[..., 3]
            restored[alpha > 0] = values[region["value"]["brushlabels"][0]]
        np.testing.assert_array_equal(restored, mask)


def polygons(folder: Path, image_id: str, size: tuple[int, ...]) -> list[tuple[int, np.ndarray]]:
    """(class, f64[n,2] px) of every line, read as ultralytics reads them."""
    class_polygons = []
    for line in (folder / "labels" / "train" / f"{file_stem(image_id)}.txt").read_text(encoding="ascii").splitlines():
        number, *rest = line.split()
        assert len(rest) >= 6 and len(rest) % 2 == 0
        points = np.array(rest, np.float32).reshape(-1, 2)
        assert ((points >= 0) & (points <= 1)).all() and (
            np.ptp(points, axis=0) > 0
        ).all()  # a box without area would be dropped
        class_polygons.append((int(number), points * np.array([size[1], size[0]], np.float32)))
    return class_polygons


def test_yolo_has_one_label_file_per_image_and_data_yaml_names_them(tmp_path: Path) -> None:
    yolo_seg.write(stream(), RECORDS, tmp_path)
    data = yaml.safe_load((tmp_path / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate(LABELS.names))
    images = (tmp_path / data["train"]).read_text(encoding="utf-8").splitlines()
    labels = [image.replace("/images/", "/labels/").rsplit(".", 1)[0] + ".txt" for image in images]  # ultralytics' own rule
    assert sorted(map(Path, labels)) == sorted(p.relative_to(tmp_path) for p in (tmp_path / "labels").rglob("*.txt"))
    assert polygons(tmp_path, "deep/er", (9, 40)) == []
    figures = json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))
    assert figures["pixels_of_255_as_background"] == sum(int((mask == 255).sum()) for mask in MASK_OF.values()) > 0
    assert f"IoU {figures['mean_iou_with_the_masks']}," in (tmp_path / "README.txt").read_text(encoding="utf-8")


def exported(mask: np.ndarray, out: Path) -> tuple[list[tuple[int, np.ndarray]], dict[str, Any]]:
    record = ImageRecord("x", "x.jpg", mask.shape, "train", (0,), b"")  # pyright: ignore[reportArgumentType]
    records = Records(LABELS, (record,), ())
    yolo_seg.write(iter([("x", mask)]), records, out)
    return polygons(out, "x", mask.shape), json.loads((out / "losses.json").read_text(encoding="utf-8"))


@settings(max_examples=60, deadline=None)
@given(MASKS)
def test_a_polygon_is_its_component_with_holes_filled_by_centres_and_truncated(mask: np.ndarray) -> None:
    from scipy import ndimage

    numbers, areas = mask_files.components(mask == 1)
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), 1):
        component = numbers[rows, columns] == number
        points = yolo_seg.outline(component)
        # background that touches the outside at a corner alone may count as outside or as a hole
        least_filled = ndimage.binary_fill_holes(component, np.ones((3, 3)))
        most_filled = ndimage.binary_fill_holes(component)
        pixels = yolo_seg.rasterise(points, component.shape)
        assert (pixels >= least_filled).all() and (pixels <= most_filled).all()
        assert areas[number - 1] <= pixels.sum()
        canvas = Image.new("1", component.shape[::-1])  # ultralytics truncates coordinates, and fills with the border
        ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in points], fill=1, outline=1)
        assert (np.asarray(canvas) >= component).all() and (np.asarray(canvas) <= most_filled).all()


def test_where_no_component_has_a_hole_the_polygons_are_the_mask(tmp_path: Path) -> None:
    mask = np.zeros((40, 50), np.uint8)
    mask[3:20, 5:30], mask[10:40, 25:50], mask[22:30, 2:10] = 1, 3, 1
    class_polygons, figures = exported(mask, tmp_path)
    assert [number for number, _ in class_polygons] == [0, 0, 2]
    assert figures["mean_iou_with_the_masks"] == 1.0 and figures["pixels_of_holes_filled"] == 0


def test_losses_count_holes_and_small_components(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[5:25, 5:25] = 1
    mask[10:20, 10:20] = 0
    mask[12:18, 12:18] = 2  # an island in the hole is laid over what fills it
    mask[30, 30] = 1
    mask[35, 35] = 3
    class_polygons, figures = exported(mask, tmp_path)
    # the pixel of class 3 is its largest component, that of class 1 is not
    assert [number for number, _ in class_polygons] == [0, 1, 2]
    assert figures["pixels_of_holes_filled"] == 100 and figures["parts_left_out"] == figures["pixels_of_parts_left_out"] == 1
    assert figures["iou_with_the_masks"] == {"boat": round(300 / (400 - 36 + 1), 4), LABELS.names[1]: 1.0, "größe": 1.0}


def test_the_presets_name_every_format_in_the_comment() -> None:
    for path in (PROJECT / "presets").glob("*.yaml"):
        line = next(line for line in path.read_text(encoding="utf-8").splitlines() if "formats:" in line)
        assert set(WRITTEN) <= set(re.findall(r"\w+", line)), path


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), st.text("ab/.%", min_size=1, max_size=6))
def test_a_name_in_an_archive_stays_inside_and_gives_back_its_id(first: str, second: str) -> None:
    for image_id in (first, second):
        stem = mask_files.nested_stem(image_id)
        assert mask_files.id_of(stem) == mask_files.id_of(file_stem(image_id)) == image_id
        assert not stem.startswith("/") and not {"", ".", ".."} & set(stem.split("/"))


def test_voc_files_are_palette_images_of_the_mask_values(tmp_path: Path) -> None:
    voc_png.write(stream(), RECORDS, tmp_path)
    for image_id, mask in MASK_OF.items():
        with Image.open(tmp_path / "SegmentationClass" / f"{file_stem(image_id)}.png") as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), mask)
