"""Prepare opens every image once, lists all problems at once, and writes the same bytes however many processes help."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline import runtime
from pipeline.core import records, store
from pipeline.core.labels import IGNORE
from pipeline.core.sections import Dataset, Prepare
from pipeline.jobs import train
from pipeline.jobs.prepare import prepare
from pipeline.listing import DatasetError
from stages.prepare import main
from tests.shared_data import shared
from tests.toys import PROJECT, SCRATCH, Toy, toy_folder

FOLDER = {"images": "images", "tags": None, "classes": None, "val_share": 0.0}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")


def save(image: Image.Image, path: Path, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)


def run(
    root: Path,
    out: Path,
    *,
    on_bad_image: str = "fail",
    options: dict | None = None,
    audit_list: str | None = None,
) -> records.Records:
    settings = Dataset("folder", str(root), options or FOLDER)
    rules = Prepare(on_bad_image, "gzip", audit_list)  # type: ignore[arg-type]
    places = {"records_out": out / "records.h5", "truth_out": out / "truth.h5"}
    return prepare(settings, rules, digest="d", engine=runtime, **places)


def failure(root: Path, out: Path, **how: Any) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        run(root, out, **how)
    assert not list(out.glob("records.h5*")) and not list(out.glob("truth.h5*")), (
        "nothing may be left where something is wrong"
    )
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One good photograph of a cat; tests add to it."""
    save(Image.new("RGB", (8, 6), (10, 20, 30)), tmp_path / "raw/images/cat/good.png")
    return tmp_path / "raw"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def pixels(prepared: records.Records, root: Path, image_id: str) -> np.ndarray:
    return records.read_image(prepared.by_id()[image_id], root)


# -- the audit list ----------------------------------------------------------------------------------------------------


def masked(root: Path, count: int) -> Path:
    for index in range(count):
        save(Image.new("RGB", (8, 6)), root / f"images/dog/größe {index}.png")
        save(Image.new("L", (8, 6)), root / f"masks/dog/größe {index}.png")
    return root


def test_an_audit_list_names_the_only_images_whose_masks_are_truth(root: Path, out: Path) -> None:
    (masked(root, 3) / "audit.txt").write_text("dog/größe 1\n\n dog/gro\u0308ße 2 \n", encoding="utf-8-sig")
    run(root, out, audit_list="audit.txt")
    assert store.Store(out / "truth.h5", store.TRUTH).ids == ["dog/größe 1", "dog/größe 2"]


def test_an_audit_list_that_is_all_there_is_changes_no_byte(root: Path, out: Path) -> None:
    (masked(root, 2) / "audit.txt").write_text("dog/größe 1\ndog/größe 0\n", encoding="utf-8")
    run(root, out)
    run(root, out / "listed", audit_list="audit.txt")
    for name in ("records.h5", "truth.h5"):
        assert (out / name).read_bytes() == (out / "listed" / name).read_bytes()


def test_unknown_ids_and_images_without_masks_in_an_audit_list_are_all_reported(root: Path, out: Path) -> None:
    (masked(root, 1) / "audit.txt").write_text("dog/größe 0\ncat/good\n<script>\n../x\n", encoding="utf-8")
    text = str(failure(root, out, audit_list="audit.txt"))
    for problem in (
        "'<script>': in audit.txt, but no image",
        "'../x': in audit.txt, but no image",
        "'cat/good': in audit.txt, but it has no mask",
    ):
        assert problem in text
    assert "größe" not in text


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [("none.txt", None, "cannot be read"), ("audit.txt", b"\n \n", "names no image"),
     ("audit.txt", b"\xff\xfe", "cannot be read"), ("../audit.txt", b"cat/good", "must lie under dataset.root"),
     ("/audit.txt", None, "must lie under dataset.root")],
)  # fmt: skip
def test_an_audit_list_that_is_no_list_is_refused_with_its_key(
    root: Path, out: Path, name: str, content: bytes | None, problem: str
) -> None:
    if content is not None:
        (root / name).write_bytes(content)
    text = str(failure(root, out, audit_list=name))
    assert problem in text and "prepare.audit_list" in text and "params.yaml" in text


# -- what is read ------------------------------------------------------------------------------------------------------


def test_records_hold_size_split_tags_and_hash_and_truth_holds_the_masks(tmp_path: Path, out: Path) -> None:
    root = toy_folder(tmp_path / "raw")
    prepared = run(root, out)
    assert records.read(out / "records.h5") == prepared
    assert (len(prepared.split("train")), len(prepared.split("val")), prepared.labels.names) == (9, 3, ("disc", "square"))
    truth = store.Store(out / "truth.h5", store.TRUTH)
    truth.require([record.id for record in prepared])
    for record in prepared:
        mask = truth.read(record.id, "mask")
        assert mask.shape == record.size and set(np.unique(mask)) - {0} == {tag + 1 for tag in record.tags or ()}
        assert store.file_digest(root / record.path) == record.sha256.hex()


def test_without_masks_truth_is_empty_and_readable(root: Path, out: Path) -> None:
    run(root, out)
    assert len(store.Store(out / "truth.h5", store.TRUTH)) == 0


def test_every_kind_of_pixel_becomes_rgb(root: Path, out: Path) -> None:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    save(Image.fromarray(grey), root / "images/cat/grey.png")
    save(Image.fromarray(grey.astype(np.uint16) * 257), root / "images/cat/sixteen.png")
    save(Image.fromarray(grey.astype(np.uint16) * 257), root / "images/cat/sixteen.tif")
    (root / "images/cat/sixteen.tif").rename(root / "images/cat/tiff16.tif")
    save(Image.new("CMYK", (8, 6), (0, 255, 255, 0)), root / "images/cat/cmyk.jpg", quality=100)
    save(Image.new("RGBA", (8, 6), (0, 0, 0, 0)), root / "images/cat/clear.png")
    save(Image.new("RGB", (8, 6), (200, 0, 0)).quantize(2), root / "images/cat/palette.png")
    prepared = run(root, out)
    for name in ("grey", "sixteen", "tiff16"):
        assert np.array_equal(pixels(prepared, root, f"cat/{name}"), np.repeat(grey[..., None], 3, axis=2)), name
    red = pixels(prepared, root, "cat/cmyk")[0, 0].astype(int)
    assert red[0] > 200 and red[1:].max() < 60
    assert (pixels(prepared, root, "cat/clear") == 255).all()
    assert pixels(prepared, root, "cat/palette")[0, 0].tolist() == [200, 0, 0]


def test_exif_orientation_is_applied_and_masks_are_taken_as_upright(root: Path, out: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored lying, shown upright
    save(Image.new("RGB", (8, 6)), root / "images/cat/turned.jpg", exif=exif)
    save(Image.new("L", (6, 8), 1), root / "masks/cat/turned.png")
    prepared = run(root, out)
    assert prepared.by_id()["cat/turned"].size == (8, 6) == pixels(prepared, root, "cat/turned").shape[:2]
    save(Image.new("L", (8, 6), 1), root / "masks/cat/turned.png")
    assert "masks are not rotated by EXIF" in str(failure(root, out.with_name("again")))


def test_one_pixel_and_forty_eight_million_are_both_fine(root: Path, out: Path) -> None:
    save(Image.new("RGB", (1, 1)), root / "images/cat/dot.png")
    save(Image.new("L", (1, 1), 1), root / "masks/cat/dot.png")
    save(Image.new("L", (8000, 6000), 90), root / "images/cat/huge.png", compress_level=1)
    prepared = run(root, out)
    assert (prepared.by_id()["cat/dot"].size, prepared.by_id()["cat/huge"].size) == ((1, 1), (6000, 8000))
    assert store.Store(out / "truth.h5", store.TRUTH).read("cat/dot", "mask").tolist() == [[1]]


def test_names_with_spaces_and_unicode_survive_the_file(root: Path, out: Path) -> None:
    for name in ("summer 2023/größe", "海", "a.b.c"):
        save(Image.new("RGB", (3, 3)), root / f"images/cat/{name}.png")
    run(root, out)
    assert {"cat/summer 2023/größe", "cat/海", "cat/a.b.c"} < set(records.read(out / "records.h5").by_id())


def test_untagged_images_and_images_without_a_class_stay_apart(root: Path, out: Path) -> None:
    (root / "tags.csv").write_text("id,tags\ncat/good,cat\nnone,\n")
    for name in ("none", "unknown"):
        save(Image.new("RGB", (3, 3)), root / f"images/{name}.png")
    run(root, out)
    assert {record.id: record.tags for record in records.read(out / "records.h5")} == {
        "cat/good": (0,),
        "none": (),
        "unknown": None,
    }


def test_train_learns_from_images_without_any_class_and_not_from_untagged_ones(root: Path, out: Path) -> None:
    (root / "tags.csv").write_text("id,tags\ncat/good,cat\nnone,\n")
    for name in ("none", "unknown"):
        save(Image.new("RGB", (3, 3)), root / f"images/{name}.png")
    run(root, out)
    settings = Toy(root).settings()
    made, _ = train.job(settings, "methods", records=out / "records.h5", init=SCRATCH, masks=None, engine=runtime)
    assert [(record.id, record.tags) for record in made.images.records] == [("cat/good", (0,)), ("none", ())]


# -- what is refused ---------------------------------------------------------------------------------------------------


def add_unusable_images(root: Path) -> dict[str, str]:
    """Adds an image per way of being unusable; id → words that the reason must hold."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    save(noise, root / "images/cat/cut.jpg")
    (root / "images/cat/cut.jpg").write_bytes((root / "images/cat/cut.jpg").read_bytes()[:-600])
    save(noise, root / "images/cat/cutpng.png")
    (root / "images/cat/cutpng.png").write_bytes((root / "images/cat/cutpng.png").read_bytes()[:-900])
    (root / "images/cat/empty.jpg").write_bytes(b"")
    (root / "images/cat/text.jpg").write_text("this is no picture")
    for name, size, value in (("small", (4, 4), 1), ("strange", (8, 6), 7), ("broken", (8, 6), 1)):
        save(Image.new("RGB", (8, 6)), root / f"images/cat/{name}.png")
        save(Image.new("L", size, value), root / f"masks/cat/{name}.png")
    (root / "masks/cat/broken.png").write_bytes(b"no picture either")
    save(Image.new("RGB", (8, 6)), root / "images/cat/colours.png")
    save(Image.new("RGB", (8, 6)), root / "masks/cat/colours.png")
    return {
        "cat/cut": "truncated",
        "cat/cutpng": "truncated",
        "cat/empty": "not a known image format",
        "cat/text": "not a known image format",
        "cat/small": "its mask is 4×4 px (h×w), the upright image 6×8",
        "cat/strange": "its mask holds the values [7]; allowed are 0..1 and 255",
        "cat/broken": "its mask cannot be read",
        "cat/colours": "palette or 8-bit greyscale",
    }


def test_every_unusable_image_is_listed_with_its_reason(root: Path, out: Path) -> None:
    expected = add_unusable_images(root)
    error = failure(root, out)
    assert len(error.problems) == len(expected) and f"{len(expected)} problems" in str(error)
    for image_id, words in expected.items():
        assert any(repr(image_id) in problem and words in problem for problem in error.problems), image_id
    assert "on_bad_image" in str(error)


def test_skip_leaves_them_out_and_records_why(root: Path, out: Path) -> None:
    expected = add_unusable_images(root)
    run(root, out, on_bad_image="skip")
    prepared = records.read(out / "records.h5")
    assert [record.id for record in prepared] == ["cat/good"] and {image_id for image_id, _ in prepared.skipped} == set(
        expected
    )
    assert all(expected[image_id] in reason for image_id, reason in prepared.skipped)


def test_problems_of_lists_and_broken_images_come_in_one_error(root: Path, out: Path) -> None:
    (root / "tags.csv").write_text("id,tags\ncat/good,cat dragon\nghost,cat\n../up,cat\ncat/cut,cat\n")
    add_unusable_images(root)
    save(Image.new("RGB", (8, 6)), root / "images/cat/good.jpg")
    problems = "\n".join(failure(root, out, options=FOLDER | {"classes": ["cat"], "val_share": 0.0}).problems)
    for words in (
        "unknown tag 'dragon' of 1 image (first 'cat/good'); known are cat",
        "'ghost'",
        "'../up'",
        "'cat/good': two image files",
        "truncated",
        "mask is 4×4",
    ):
        assert words in problems


def test_problems_of_lists_are_never_skipped(root: Path, out: Path) -> None:
    save(Image.new("RGB", (8, 6)), root / "images/cat/good.jpg")
    assert "two image files have this id" in str(failure(root, out, on_bad_image="skip"))


def test_twenty_problems_are_shown_and_all_are_counted(root: Path, out: Path) -> None:
    for number in range(30):
        (root / f"images/cat/{number:02d}.jpg").write_bytes(b"")
    text = str(failure(root, out))
    assert "30 problems" in text and "'cat/19'" in text and "'cat/20'" not in text and "and 10 more" in text


@pytest.mark.parametrize("how", ["fail", "skip"])
def test_an_empty_train_split_is_an_error(root: Path, out: Path, how: str) -> None:
    assert "split train" in str(failure(root, out, on_bad_image=how, options=FOLDER | {"classes": None, "val_share": 1.0}))
    (root / "images/cat/good.png").write_bytes(b"")
    assert failure(root, out, on_bad_image=how)


def test_a_crash_leaves_what_was_there_before(root: Path, out: Path) -> None:
    run(root, out)
    before = [(out / name).read_bytes() for name in ("records.h5", "truth.h5")]
    (root / "images/cat/bad.png").write_bytes(b"")
    with pytest.raises(DatasetError):
        run(root, out)
    assert [(out / name).read_bytes() for name in ("records.h5", "truth.h5")] == before


# -- what is likely a mistake ------------------------------------------------------------------------------------------


def test_prepare_says_what_the_data_look_like_before_and_what_pixels_say_after(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = toy_folder(tmp_path / "raw")
    (root / "images/phone.heic").write_bytes(b"")
    save(Image.open(root / "images/train 000.png").resize((40, 40)), root / "images/small.png")
    with (root / "tags.csv").open("a", encoding="utf-8") as file:
        file.write("small,DISC,val\n")
    with caplog.at_level("INFO", logger="tag2mask"):
        run(root, out)
    text = caplog.text
    before, after = text[: text.index("prepare ")], text[text.index("prepare ") :]
    for words in ("13 images (9 train, 4 val)", "1 .heic in ", "'DISC' (1 image) stands beside 'disc'", "fewer than 20"):
        assert words in before
    assert "1 image with a side under 64 px" in after and "1 value higher: add 1 to the masks" in after


def test_masks_of_another_order_are_named_and_change_nothing(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = toy_folder(tmp_path / "raw")
    with caplog.at_level("INFO", logger="tag2mask"):
        run(root, out, options=FOLDER | {"classes": ["square", "disc"]})
    assert "set `classes: [disc, square]` in dataset.options" in caplog.text
    assert records.read(out / "records.h5").labels.names == ("square", "disc")


def test_masks_one_value_too_high_are_named_beside_the_values_of_no_class(tmp_path: Path, out: Path) -> None:
    root = toy_folder(tmp_path / "raw")
    for path in (root / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask > 0, mask + 1, 0).astype(np.uint8)).save(path)
    text = str(failure(root, out))
    assert "its mask holds the values [3]; allowed are 0..2 and 255" in text
    assert "1 value lower (as if the list of classes began with background)" in text


@pytest.mark.parametrize("processes", ["1", "2"])
def test_an_image_changed_since_prepare_ends_any_stage_with_one_line(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, processes: str
) -> None:
    root = toy_folder(tmp_path / "raw", train=3, val=1)
    prepared = run(root, out)
    monkeypatch.setenv("TAG2MASK_WORKERS", processes)

    def read_all() -> str:
        with pytest.raises(click.ClickException) as caught, runtime.stage(tmp_path / "provenance"):
            list(runtime.map_parts(partial(records.read_image, root=root), prepared.images, what="read"))
        return caught.value.message

    changed = root / "images/train 001.png"
    changed.write_bytes((root / "images/train 002.png").read_bytes())
    assert read_all() == f"{changed} has changed since prepare read it; run `dvc repro`, which starts from prepare again"
    changed.unlink()
    assert read_all() == f"{changed} is gone since prepare read it; put it back, or run `dvc repro`"


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_one_and_three_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = toy_folder(tmp_path / "raw", train=60, val=10, side=16)
    (root / "images/train 003.png").write_bytes(b"broken")
    for processes in ("1", "3"):
        monkeypatch.setenv("TAG2MASK_WORKERS", processes)
        run(root, tmp_path / processes, on_bad_image="skip")
    for name in ("records.h5", "truth.h5"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_memory_does_not_grow_with_the_pixels_that_pass_through(root: Path, out: Path) -> None:
    for number in range(2):
        save(Image.new("RGB", (1500, 1000)), root / f"images/cat/{number}.png", compress_level=1)
        save(Image.new("L", (1500, 1000), 1), root / f"masks/cat/{number}.png")
    for number in range(2, 40):
        for kind in ("images", "masks"):
            (root / f"{kind}/cat/{number}.png").hardlink_to(root / f"{kind}/cat/1.png")
    tracemalloc.start()
    run(root, out)  # 180 MB of pixels and 60 MB of masks, 6 MB of them at a time
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_the_stage_writes_both_files_and_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TAG2MASK_LAUNCHER", "inline")
    Toy(toy_folder(tmp_path / "raw")).write(tmp_path)
    arguments = ["--raw", "raw", "--records", "data/records.h5", "--truth", "data/truth.h5"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in Path("data").iterdir()) == ["records.h5", "truth.h5"]
    Path("raw/images/val 009.png").unlink()
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and "'val 009': in tags.csv, but no file" in done.output and "Traceback" not in done.output


def test_the_stage_names_wrong_params_and_a_missing_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    toy = Toy(tmp_path / "raw")
    toy.params["dataset"]["options"] = FOLDER | {"val_share": 2, "extra": 1}
    toy.write(tmp_path)
    arguments = ["--raw", "raw", "--records", "r.h5", "--truth", "t.h5"]
    (tmp_path / "raw").mkdir()
    output = CliRunner().invoke(main, arguments).output
    assert "dataset.options.val_share" in output and "dataset.options.extra: unknown key" in output
    toy.params["dataset"]["options"] = FOLDER
    toy.write(tmp_path)
    (tmp_path / "raw").rmdir()
    assert "is no folder" in CliRunner().invoke(main, arguments).output


def test_help_says_what_is_read_and_written() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert output.count("Read:") == 1 and output.count("Written:") == 2


def test_prepare_imports_no_torch() -> None:
    code = (
        "import sys, stages.prepare; from pipeline.core import plugins; "
        "[plugins.load('datasets', name) for name in plugins.available('datasets')]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0


def test_the_real_tiny_set_is_prepared(tmp_path: Path) -> None:
    classes = ["cat", "cow", "dog", "horse", "person", "sheep"]
    options = {"train_list": "train_aug", "val_list": "val", "tags": "csv", "classes": classes}
    settings = Dataset("voc2012", str(shared("data", "voc6-tiny")), options)
    places = {"records_out": tmp_path / "r.h5", "truth_out": tmp_path / "t.h5"}
    prepared = prepare(settings, Prepare("fail", "gzip", None), digest="d", engine=runtime, **places)
    truth = store.Store(tmp_path / "t.h5", store.TRUTH)
    assert (len(prepared.split("train")), len(prepared.split("val")), len(truth)) == (48, 24, 72)
    with h5py.File(tmp_path / "t.h5") as file:
        assert set(np.unique(file["mask"]["data"][()])) <= {*range(7), IGNORE}
