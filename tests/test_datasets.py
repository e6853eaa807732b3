"""Data sets list the images of their layouts with tags and masks, and every problem of lists."""

from __future__ import annotations

import json
import os
import pickle
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.labels import IGNORE
from pipeline.core.records import read_mask
from pipeline.datasets.coco2014 import dataset as coco2014
from pipeline.datasets.folder import dataset as folder
from pipeline.datasets.voc2012 import dataset as voc2012
from pipeline.jobs.listings import list_images
from pipeline.listing import DatasetError, id_problem, val_by_hash, without_suffix
from pipeline.tag_table import split_tags
from tests.shared_data import shared


def photograph(path: Path, size: tuple[int, int] = (6, 4)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path)


def problems_of(make: Callable[[], object]) -> list[str]:
    with pytest.raises(DatasetError) as caught:
        make()
    return caught.value.problems


# -- shared functions ---------------------------------------------------------------------------------------------------


def test_semicolons_anywhere_in_the_column_let_tags_hold_spaces() -> None:
    assert split_tags(["dining table; cat", "dog", ""]) == [("dining table", "cat"), ("dog",), ()]
    assert split_tags(["cat dog cat", " sheep "]) == [("cat", "dog"), ("sheep",)]


def test_only_an_image_suffix_is_cut_from_an_id() -> None:
    assert [without_suffix(name) for name in ("a/b.jpg", "scan.v2", "c.JPEG", "d")] == ["a/b", "scan.v2", "c", "d"]


@pytest.mark.parametrize("image_id", ["../a", "a/../../b", "/etc/passwd", "", "a\\b", "a\0b", "caf\udce9"])
def test_an_id_that_could_leave_its_folder_is_refused(image_id: str) -> None:
    assert id_problem(image_id)


@pytest.mark.parametrize("image_id", ["a", "summer 2023/été über 海.v2", "..a", "a..b/c"])
def test_an_ordinary_id_is_fine(image_id: str) -> None:
    assert id_problem(image_id) is None


@given(st.text(min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_val_share_only_moves_images_to_val(image_id: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert (val_by_hash(image_id, low), val_by_hash(image_id, high)) != ("val", "train")
    assert val_by_hash(image_id, 0) == "train" and val_by_hash(image_id, 1) == "val"


def test_the_val_share_is_met_on_many_ids() -> None:
    splits = [val_by_hash(f"image {number}", 0.25) for number in range(4000)]
    assert abs(splits.count("val") / 4000 - 0.25) < 0.03


def test_the_error_shows_twenty_problems_and_the_count_and_survives_pickling() -> None:
    error = DatasetError([f"problem {number:02d}" for number in range(33)], hint="correct them")
    for copy in (error, pickle.loads(pickle.dumps(error))):
        text = str(copy)
        assert "33 problems" in text and "problem 19" in text and "problem 20" not in text
        assert "and 13 more" in text and text.endswith("correct them") and len(copy.problems) == 33


@pytest.mark.parametrize("mode", ["L", "P"])
def test_masks_keep_their_values_whatever_the_palette(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1, 2], [255, 3, 20]], np.uint8)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette([number * 3 % 256 for number in range(768)])
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_mask(tmp_path / "m.png"), values)


def test_a_mask_in_colours_is_refused_with_its_mode(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="RGB image; it must be palette or 8-bit greyscale"):
        read_mask(tmp_path / "m.png")


# -- folder ------------------------------------------------------------------------------------------------------------


def own_photographs(root: Path, table: str | None, *names: str) -> Path:
    for name in names:
        photograph(root / "images" / name)
    if table is not None:
        (root / "tags.csv").write_text(table, encoding="utf-8")
    return root


def opened(root: Path, classes: tuple[str, ...] | None = None, val_share: float = 0.0) -> folder.Dataset:
    return folder.Dataset(root, folder.Params("images", None, classes, val_share))


def test_nested_unicode_and_spaced_names_become_ids(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\nsommer 23/größe,cat\n海.v2.png,\n", "sommer 23/größe.jpg", "海.v2.png")
    listings = {listing.id: listing for listing in opened(root).listings()}
    assert listings["sommer 23/größe"].tags == ("cat",) and listings["sommer 23/größe"].path == Path(
        "images/sommer 23/größe.jpg"
    )
    assert listings["海.v2"].tags == ()


def test_accents_are_compared_in_composed_form(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\n" + unicodedata.normalize("NFC", "café,crème") + "\n")
    photograph(root / "images" / unicodedata.normalize("NFD", "café.jpg"))
    (listing,) = opened(root, (unicodedata.normalize("NFD", "crème"),)).listings()
    assert listing.id == unicodedata.normalize("NFC", "café") and (root / listing.path).is_file()
    assert listing.tags == opened(root, (unicodedata.normalize("NFD", "crème"),)).labels.names


def test_an_image_without_a_row_is_untagged_and_one_with_an_empty_cell_holds_no_class(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\na,cat\nb,\n", "a.jpg", "b.jpg", "c.jpg")
    assert [listing.tags for listing in opened(root).listings()] == [("cat",), (), None]


def test_classes_are_the_names_in_the_table_sorted_unless_params_give_them(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\na,dog cat\n", "a.jpg")
    assert opened(root).labels.names == ("cat", "dog")
    assert opened(root, ("dog", "cat", "cow")).labels.names == ("dog", "cat", "cow")


def test_one_folder_per_class_needs_no_table(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/1.jpg", "dining table/1.jpg", "cat/old/2.jpg", "loose.jpg")
    tags = {listing.id: listing.tags for listing in opened(root).listings()}
    assert tags == {"cat/1": ("cat",), "cat/old/2": ("cat",), "dining table/1": ("dining table",), "loose": None}


def test_the_split_column_wins_over_the_share(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags,split\na,cat,val\nb,cat,train\nc,cat\n", "a.jpg", "b.jpg", "c.jpg")
    assert [listing.split for listing in opened(root, val_share=0).listings()] == ["val", "train", "train"]
    assert [listing.split for listing in opened(root, val_share=1).listings()] == ["val", "train", "val"]


def test_the_split_does_not_depend_on_other_images(tmp_path: Path) -> None:
    few = own_photographs(tmp_path / "few", None, *(f"cat/{number}.png" for number in range(10)))
    many = own_photographs(tmp_path / "many", None, *(f"cat/{number}.png" for number in range(30)))
    splits = {listing.id: listing.split for listing in opened(many, val_share=0.4).listings()}
    assert all(splits[listing.id] == listing.split for listing in opened(few, val_share=0.4).listings())


def test_every_problem_of_a_folder_is_listed_at_once(tmp_path: Path) -> None:
    table = "id,tags,split\na,cat,train\na.jpg,cat,train\n../x,cat,train\nghost,cat,train\nb,dog,test\n"
    root = own_photographs(tmp_path, table, "a.jpg", "b.jpg", "c.jpg", "c.png")
    problems = "\n".join(problems_of(lambda: opened(root).listings()))
    for words in ("'a': stands twice", "'../x': an id must", "'ghost': in tags.csv", "split 'test'", "'c': two image files"):
        assert words in problems


def test_listings_that_are_sound_come_with_the_error(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\na,cat\nghost,cat\n", "a.jpg")
    with pytest.raises(DatasetError) as caught:
        opened(root).listings()
    assert [listing.id for listing in caught.value.listings] == ["a"]


def test_tags_separated_by_commas_are_an_error_and_not_lost(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\na,cat,dog\nb\n", "a.jpg", "b.jpg")
    problems = problems_of(lambda: opened(root, ("cat", "dog")).listings())
    assert "line 2: 3 columns" in problems[0] and "line 3: 1 columns" in problems[1]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b"name,tags\na,cat\n", "column 'id' is missing"),
        (b"id,tags\na,caf\xe9\n", "not UTF-8"),
        (b"id,tags,tags\n", "stands twice"),
        (b"", "missing"),
    ],
)
def test_a_table_that_cannot_be_read_says_why(tmp_path: Path, table: bytes, words: str) -> None:
    root = own_photographs(tmp_path, None, "a.jpg")
    (root / "tags.csv").write_bytes(table)
    assert any(words in problem for problem in problems_of(lambda: opened(root)))


def test_a_byte_order_mark_and_crlf_are_fine(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "a.jpg")
    (root / "tags.csv").write_bytes(b"\xef\xbb\xbfid , tags\r\n a , cat \r\n")
    assert [listing.tags for listing in opened(root).listings()] == [("cat",)]


def test_no_images_folder_and_no_tags_are_errors(tmp_path: Path) -> None:
    assert "is missing" in problems_of(lambda: opened(tmp_path))[0]
    own_photographs(tmp_path, "id,tags\na,\n", "a.jpg")
    assert "no image has a tag" in problems_of(lambda: opened(tmp_path))[0]


def test_hidden_files_are_skipped(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg", "cat/._a.jpg")
    assert [listing.id for listing in opened(root).listings()] == ["cat/a"]


def test_masks_that_no_image_is_named_as_are_an_error(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg", "cat/b.jpg")
    (root / "masks/cat").mkdir(parents=True)
    Image.new("L", (6, 4), 1).save(root / "masks/cat/a_mask.png")
    assert "none is called" in problems_of(lambda: opened(root).listings())[0]
    (root / "masks/cat/a_mask.png").rename(root / "masks/cat/a.png")
    first, second = opened(root).listings()
    assert (first.mask, second.mask) == (True, False)
    assert opened(root).truth(first).tolist() == [[1] * 6] * 4


@pytest.mark.skipif(os.name != "posix", reason="file names are bytes only there")
def test_a_file_name_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg")
    try:
        (root / "images/cat" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert "no valid UTF-8" in problems_of(lambda: opened(root).listings())[0]


def test_a_bad_table_does_not_also_say_that_no_image_has_a_tag(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "photo,what\na,cat\n", "a.jpg")
    assert len(problems_of(lambda: opened(root))) == 1
    assert len(problems_of(lambda: opened(root, ("cat",)).listings())) == 1


def test_spellings_of_columns_and_splits_are_understood(tmp_path: Path) -> None:
    table = "FILENAME;Labels;Subset\na.jpg;cat|hot dog;Validation\nb.jpg;cat;TRAIN\n"
    first, second = opened(own_photographs(tmp_path, table, "a.jpg", "b.jpg")).listings()
    assert (first.tags, first.split, second.tags, second.split) == (("cat", "hot dog"), "val", ("cat",), "train")


def test_reserved_and_unusable_names_are_all_reported_with_what_else_is_wrong(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, "id,tags\na,cat\nghost,cat\n", "a.jpg")
    problems = "\n".join(problems_of(lambda: opened(root, ("background", "cat", "cat", "../x", "y" * 300))))
    for words in ("'ghost'", "'background': the name is reserved", "'cat' stands twice", "'../x'", "300 characters"):
        assert words in problems


def test_a_folder_called_background_is_no_class(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg", "background/b.jpg")
    assert "an empty tags cell" in problems_of(lambda: opened(root))[0]


# -- folder: links, and files that are not read ------------------------------------------------------------------------


def test_links_that_lead_out_or_to_folders_are_refused_and_named(tmp_path: Path) -> None:
    root = own_photographs(tmp_path / "raw", "id,tags\na,cat\nout,cat\nmore/b,cat\n", "a.jpg")
    photograph(tmp_path / "elsewhere/b.jpg")
    (root / "images/out.jpg").symlink_to(tmp_path / "elsewhere/b.jpg")
    (root / "images/more").symlink_to(tmp_path / "elsewhere")
    (root / "images/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    problems = problems_of(lambda: opened(root).listings())
    assert len(problems) == 3  # and nothing of ids in tags.csv that lie behind the links
    for problem, words in zip(
        problems, ("'images/gone.jpg' is a link to", "'images/more' is a link to the folder", "leads out of"), strict=True
    ):
        assert words in problem
    assert "cp -rL" in problems[1] and str(tmp_path / "elsewhere/b.jpg") in problems[2]


@pytest.mark.parametrize("name", ["images", "masks", "tags.csv"])
def test_what_is_read_must_not_be_a_link_that_leads_out(tmp_path: Path, name: str) -> None:
    root = own_photographs(tmp_path / "raw", "id,tags\na,cat\n", "a.jpg")
    photograph(root / "masks/a.png")
    (root / name).rename(tmp_path / "moved")
    (root / name).symlink_to(tmp_path / "moved")
    assert any(f"'{name}' is a link" in problem for problem in problems_of(lambda: opened(root, ("cat",)).listings()))


def test_a_link_to_a_file_of_the_same_data_set_is_an_image(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg")
    (root / "images/dog").mkdir()
    (root / "images/dog/b.jpg").symlink_to("../cat/a.jpg")
    assert [listing.id for listing in opened(root).listings()] == ["cat/a", "dog/b"]


def test_links_of_other_layouts_are_refused_too(tmp_path: Path) -> None:
    root = voc_layout(tmp_path / "raw")
    (root / "JPEGImages").rename(tmp_path / "photographs")
    (root / "JPEGImages").symlink_to(tmp_path / "photographs")
    _, problems = list_images(voc(root))
    assert len(problems) == 1 and "'JPEGImages' is a link to the folder" in problems[0]


def test_files_that_are_not_read_are_counted_by_ending(tmp_path: Path) -> None:
    root = own_photographs(tmp_path, None, "cat/a.jpg")
    for name in (".hidden.heic", "a.heic", "b.HEIC", "notes.txt", "README"):
        (root / "images/cat" / name).write_bytes(b"")
    dataset = opened(root)
    (warning,) = dataset.warnings
    assert warning.startswith("1 without ending, 2 .heic, 1 .txt in ") and "heif-convert" in warning and ".webp" in warning
    assert len(dataset.listings()) == 1
    (root / "images/cat/a.jpg").unlink()
    assert "holds no image: 1 without ending, 2 .heic" in problems_of(lambda: opened(root))[0]


# -- folder: where images and tags lie ---------------------------------------------------------------------------------


def test_the_root_itself_may_hold_the_images(tmp_path: Path) -> None:
    for name in ("a.jpg", "summer/b.jpg", "masks/a.png", "masks/summer/b.png"):
        photograph(tmp_path / name)
    (tmp_path / "tags.csv").write_text("id,tags\na,cat\nsummer/b,\n")
    dataset = folder.Dataset(tmp_path, folder.Params(".", None, None, 0.0))
    assert [(listing.id, listing.path.as_posix(), listing.mask) for listing in dataset.listings()] == [
        ("a", "a.jpg", True),
        ("summer/b", "summer/b.jpg", True),
    ]
    assert dataset.warnings == []
    assert "set it to `.`" in problems_of(lambda: opened(tmp_path))[0]


def test_a_sub_folder_may_hold_the_images(tmp_path: Path) -> None:
    photograph(tmp_path / "export/jpg/cat/a.jpg")
    (listing,) = folder.Dataset(tmp_path, folder.Params("export/jpg", None, None, 0.0)).listings()
    assert (listing.id, listing.path, listing.tags) == ("cat/a", Path("export/jpg/cat/a.jpg"), ("cat",))


def test_a_table_of_the_project_replaces_tags_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = own_photographs(tmp_path / "raw", "id,tags\na,cat\n", "a.jpg")
    (tmp_path / "data/tags").mkdir(parents=True)
    (tmp_path / "data/tags/second.csv").write_text("id,tags\na,dog\n")
    monkeypatch.chdir(tmp_path)
    params = folder.Params("images", "data/tags/second.csv", None, 0.0)
    assert folder.Dataset(root, params).listings()[0].tags == ("dog",)
    (tmp_path / "data/tags/second.csv").unlink()
    assert "data/tags/second.csv is missing" in problems_of(lambda: folder.Dataset(root, params))[0]
    (tmp_path / "data/tags/second.csv").symlink_to(root / "tags.csv")
    assert "leads out of data/tags" in problems_of(lambda: folder.Dataset(root, params))[0]


@pytest.mark.parametrize("tags", ["tags.csv", "/tmp/tags.csv", "data/tags", "data/tags/../x.csv", "data/tags.csv", ""])
def test_a_table_where_dvc_would_not_see_changes_is_refused(tags: str) -> None:
    with pytest.raises(ValueError, match="data/tags/ of the project"):
        folder.Params("images", tags, None, 0.0)


@pytest.mark.parametrize("images", ["../x", "/tmp", "", "masks", "a/../..", "a\\b"])
def test_images_outside_of_the_root_are_refused(images: str) -> None:
    with pytest.raises(ValueError, match="images: got"):
        folder.Params(images, None, None, 0.0)


# -- voc2012 -----------------------------------------------------------------------------------------------------------


def voc_layout(root: Path, train: str = "one\ntwo\n", val: str = "three\n", name: str = "train_aug") -> Path:
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / f"{name}.txt").write_text(train)
    (lists / "val.txt").write_text(val)
    for image_id in ("one", "two", "three"):
        photograph(root / "JPEGImages" / f"{image_id}.jpg")
    (root / "tags.csv").write_text("id,tags\none,cat person\ntwo,dog\nthree,person\n")
    return root


def voc(
    root: Path, tags: str = "csv", classes: tuple[str, ...] | None = None, train_list: str = "train_aug"
) -> voc2012.Dataset:
    return voc2012.Dataset(root, voc2012.Params(train_list, "val", tags, classes))  # type: ignore[arg-type]


def test_voc_masks_become_contiguous_and_other_classes_background(tmp_path: Path) -> None:
    root = voc_layout(tmp_path)
    (root / "SegmentationClass").mkdir()
    Image.fromarray(np.array([[0, 8, 12, 15, 255, 1]] * 4, np.uint8)).save(root / "SegmentationClass/one.png")
    dataset = voc(root, classes=("person", "cat"))
    assert dataset.labels.names == ("cat", "person")
    listings = {listing.id: listing for listing in dataset.listings()}
    assert dataset.truth(listings["one"]).tolist()[0] == [0, 1, 0, 2, 255, 0]
    assert (listings["one"].tags, listings["two"].tags, listings["two"].mask, listings["three"].split) == (
        ("cat", "person"), (), False, "val",
    )  # fmt: skip


def test_masks_of_sbd_are_for_train_aug_and_masks_of_voc_for_its_own_lists(tmp_path: Path) -> None:
    root = voc_layout(tmp_path)
    (root / "ImageSets/Segmentation/train.txt").write_text("one\n")
    for place, value in (("SegmentationClass", 8), ("SegmentationClassAug", 12)):
        (root / place).mkdir()
        for image_id in ("one", "three"):
            Image.new("L", (6, 4), value).save(root / place / f"{image_id}.png")

    def first_value(train_list: str, image_id: str) -> int:
        dataset = voc(root, train_list=train_list)
        return int(dataset.truth(next(listing for listing in dataset.listings() if listing.id == image_id))[0, 0])

    assert (first_value("train_aug", "one"), first_value("train_aug", "three"), first_value("train", "one")) == (12, 8, 8)


def test_lists_in_the_two_columns_of_sbd_are_read(tmp_path: Path) -> None:
    root = voc_layout(tmp_path, "/JPEGImages/one.jpg /SegmentationClassAug/one.png\n")
    assert [listing.id for listing in voc(root).listings()] == ["one", "three"]


def test_voc_tags_from_annotations_csv_and_npy_agree(tmp_path: Path) -> None:
    root = voc_layout(tmp_path)
    table = {}
    (root / "Annotations").mkdir()
    for image_id, names in (("one", ("person", "cat", "cat")), ("two", ("dog",)), ("three", ("person",))):
        objects = "".join(f"<object><name>{name}</name></object>" for name in names)
        (root / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")
        table[image_id] = np.isin(voc2012.VOC_CLASSES, names).astype(np.float32)
    np.save(root / "cls_labels.npy", np.array(table, object))
    tags_by_source = [
        {listing.id: sorted(listing.tags or ()) for listing in voc(root, source).listings()}
        for source in ("xml", "csv", "npy")
    ]
    assert tags_by_source[0] == tags_by_source[1] == tags_by_source[2]


def test_integer_ids_of_cls_labels_become_official_ones(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array({2007000032: np.ones(20, np.float32), np.int64(2011003276): np.ones(20)}, object))
    assert list(voc2012.read_cls_labels(tmp_path / "x.npy")) == ["2007_000032", "2011_003276"]


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_cls_labels_that_would_run_a_program_are_refused_and_do_not_run(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    np.save(tmp_path / "cls_labels.npy", np.array({"a": _Malicious(harm)}, object))
    problems = problems_of(lambda: voc2012.read_cls_labels(tmp_path / "cls_labels.npy"))
    assert "mkdir" in problems[0] and "Do not trust" in problems[0] and not harm.exists()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array"])
def test_a_damaged_cls_labels_says_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cls_labels.npy").write_bytes(content)
    assert "cannot be read" in problems_of(lambda: voc2012.read_cls_labels(tmp_path / "cls_labels.npy"))[0]


def test_cls_labels_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "list.npy", np.ones(3))
    np.save(tmp_path / "short.npy", np.array({"a": np.ones(3)}, object))
    assert "not the dict" in problems_of(lambda: voc2012.read_cls_labels(tmp_path / "list.npy"))[0]
    assert "no 20 values" in problems_of(lambda: voc2012.read_cls_labels(tmp_path / "short.npy"))[0]


def test_every_problem_of_voc_lists_is_reported_at_once(tmp_path: Path) -> None:
    root = voc_layout(tmp_path, "one\nghost\n../up\nthree\n")
    (root / "tags.csv").write_text("id,tags\none,cat unicorn\nthree,cat\nthree,dog\n")
    problems = "\n".join(problems_of(lambda: voc(root).listings()))
    for words in (
        "'three': stands twice in the lists",
        "'ghost': in a list",
        "'../up'",
        "unknown tag 'unicorn'",
        "twice in tags.csv",
    ):
        assert words in problems


def test_missing_lists_annotations_and_broken_xml_are_named(tmp_path: Path) -> None:
    root = voc_layout(tmp_path)
    assert any(
        "lists there: train_aug, val" in problem
        for problem in problems_of(lambda: voc(root, train_list="trainaug").listings())
    )
    assert any("Annotations is missing" in problem for problem in problems_of(lambda: voc(root, "xml").listings()))
    (root / "Annotations").mkdir()
    (root / "Annotations/one.xml").write_text("<annotation>")
    problems = "\n".join(problems_of(lambda: voc(root, "xml").listings()))
    assert "one.xml is no valid XML" in problems and "two.xml is missing" in problems


def test_a_class_that_voc_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="unicorn are no VOC names"):
        voc2012.Params("train", "val", "csv", ("cat", "unicorn"))


def test_the_real_tiny_set_is_read_whole() -> None:
    root = shared("data", "voc6-tiny")
    classes = ("cat", "cow", "dog", "horse", "person", "sheep")
    by_table, by_array = (voc(root, source, classes).listings() for source in ("csv", "npy"))
    assert [listing.split for listing in by_table].count("train") == 48 and len(by_table) == 72
    assert all(listing.mask and listing.tags for listing in by_table)
    assert [set(listing.tags or ()) for listing in by_table] == [set(listing.tags or ()) for listing in by_array]
    dataset = voc(root, "csv", classes)
    values = np.unique(np.concatenate([np.unique(dataset.truth(listing)) for listing in by_table[:12]]))
    assert set(values) <= {*range(7), IGNORE}


# -- coco2014 ----------------------------------------------------------------------------------------------------------

SQUARE = [0, 0, 4, 0, 4, 4, 0, 4]


def coco_layout(root: Path) -> Path:
    """Categories with gaps, out of order. Image 1: a dog upon a cat, and a crowd of cats; 2: nothing; 3: in val."""
    categories = [{"id": 17, "name": "dog"}, {"id": 3, "name": "cat"}]
    crowd = {"size": [6, 8], "counts": [24, 24]}  # column-major: the right half
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 17, "area": 4, "iscrowd": 0, "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]},
        {"id": 2, "image_id": 1, "category_id": 3, "area": 16, "iscrowd": 0, "segmentation": [SQUARE]},
        {"id": 3, "image_id": 1, "category_id": 3, "area": 99, "iscrowd": 1, "segmentation": crowd},
    ]
    for split, numbers, split_annotations in (
        ("train", (1, 2), annotations),
        ("val", (3,), [{**annotations[1], "image_id": 3}]),
    ):
        images = [{"id": n, "file_name": f"COCO_{n:03d}.jpg", "height": 6, "width": 8} for n in numbers]
        for image in images:
            photograph(root / f"{split}2014" / image["file_name"], (8, 6))
        (root / "annotations").mkdir(exist_ok=True)
        values = {"images": images, "annotations": split_annotations, "categories": categories}
        (root / f"annotations/instances_{split}2014.json").write_text(json.dumps(values))
    return root


def coco(root: Path, keep_untagged: bool = False) -> coco2014.Dataset:
    return coco2014.Dataset(root, coco2014.Params(keep_untagged))


def changed(root: Path, change: Callable[[dict], object]) -> None:
    path = root / "annotations/instances_train2014.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_coco_classes_are_contiguous_in_category_order_and_small_objects_lie_on_top(tmp_path: Path) -> None:
    dataset = coco(coco_layout(tmp_path))
    assert dataset.labels.names == ("cat", "dog")
    first, third = dataset.listings()
    assert (first.id, first.split, first.tags, third.split) == ("COCO_001", "train", ("cat", "dog"), "val")
    expected = np.zeros((6, 8), np.uint8)
    expected[:, 4:] = IGNORE
    expected[:4, :4] = 1
    expected[1:3, 1:3] = 2
    assert np.array_equal(dataset.truth(first), expected)


def test_a_crowd_of_compressed_form_reads_the_same(tmp_path: Path) -> None:
    from pycocotools import mask as rle

    root = coco_layout(tmp_path)
    before = coco(root).truth(coco(root).listings()[0])
    packed = rle.frPyObjects({"size": [6, 8], "counts": [24, 24]}, 6, 8)
    packed = {"size": [6, 8], "counts": packed["counts"].decode()}
    changed(root, lambda values: values["annotations"][2].update(segmentation=packed))
    assert np.array_equal(coco(root).truth(coco(root).listings()[0]), before)


def test_images_without_labels_stay_only_if_asked(tmp_path: Path) -> None:
    root = coco_layout(tmp_path)
    assert len(coco(root).listings()) == 2
    tags = {listing.id: listing.tags for listing in coco(root, True).listings()}
    assert tags["COCO_002"] == ()
    assert not coco(root, True).truth(coco(root, True).listings()[1]).any()


def test_a_class_that_is_only_there_as_a_crowd_is_a_tag(tmp_path: Path) -> None:
    root = coco_layout(tmp_path)
    changed(root, lambda values: values["annotations"].pop(1))
    dataset = coco(root)
    assert dataset.listings()[0].tags == ("cat", "dog") and 1 not in dataset.truth(dataset.listings()[0])


def test_every_problem_of_coco_is_reported_at_once(tmp_path: Path) -> None:
    root = coco_layout(tmp_path)

    def spoil(values: dict) -> None:
        values["annotations"][0]["category_id"] = 44
        values["annotations"][1]["image_id"] = 77
        values["images"] += [
            {**values["images"][0], "file_name": "../up.jpg"},
            {**values["images"][0], "file_name": "ghost.jpg"},
        ]

    changed(root, spoil)
    problems = "\n".join(problems_of(lambda: coco(root).listings()))
    for words in ("unknown category 44", "annotations of image 77", "'../up.jpg'", "ghost.jpg is missing"):
        assert words in problems


def test_missing_and_broken_annotation_files_are_named(tmp_path: Path) -> None:
    problems = problems_of(lambda: coco(tmp_path))
    assert len(problems) == 2 and all("instances_" in problem for problem in problems)
    root = coco_layout(tmp_path)
    (root / "annotations/instances_train2014.json").write_text("{")
    assert "no instances file" in problems_of(lambda: coco(root).listings())[0]
