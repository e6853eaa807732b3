"""What a data set looks like, and what is likely wrong with it: by lists and headers, by looks, by masks and tags."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core.contracts import Listing
from pipeline.core.labels import LabelSpace
from pipeline.core.sections import Dataset
from pipeline.jobs import survey
from pipeline.jobs.mask_agreement import MaskAgreement
from pipeline.jobs.near_duplicates import NEAR, Fingerprints, fingerprint, nearest
from pipeline.listing import DatasetError
from tests.toys import FOLDER, toy_folder

Tags = Sequence[str] | None


def listed(*tags: Tags, split: str = "train") -> list[Listing]:
    return [
        Listing(f"{split} {number:02d}", Path(f"{number}.jpg"), split, None if names is None else tuple(names), False)
        for number, names in enumerate(tags)
    ]


def warned(listings: list[Listing], *classes: str, sizes: dict[str, tuple[int, int]] | None = None) -> str:
    return "\n".join(survey.of_listings(listings, LabelSpace(classes), sizes=sizes).warnings)


def test_a_folder_is_counted_from_lists_and_headers_alone(tmp_path: Path) -> None:
    root = toy_folder(tmp_path / "raw")
    with (root / "tags.csv").open("a", encoding="utf-8") as file:
        file.write("empty,,train\n")
    for name, size in (("empty", (100, 90)), ("unlisted", (70, 300))):
        Image.new("RGB", size).save(root / "images" / f"{name}.png")
    (root / "images" / "train 000.png").write_bytes((root / "images" / "train 000.png").read_bytes()[:60])  # a header alone
    seen = survey.of(root, Dataset("folder", "elsewhere", FOLDER | {"val_share": 0.0}))
    assert (seen.images, seen.train, seen.val, seen.tagged, seen.negatives, seen.masks) == (14, 11, 3, 13, 1, 12)
    assert seen.sizes == survey.Sizes((64, 64), (72, 72), (300, 70))
    assert [(count.name, count.train, count.val, count.alone) for count in seen.classes] == [
        ("disc", 6, 2, 3),
        ("square", 6, 2, 3),
    ]
    assert "14 images (11 train, 3 val): 13 tagged, 1 untagged, 1 of train without any class, 12 with a mask" in seen.lines()


def test_every_problem_of_lists_stops_a_survey(tmp_path: Path) -> None:
    root = toy_folder(tmp_path / "raw")
    with (root / "tags.csv").open("a", encoding="utf-8") as file:
        file.write("ghost,void,train\nother,../x,test\n")
    with pytest.raises(DatasetError) as caught:
        survey.of(root, Dataset("folder", str(root), FOLDER))
    assert all(word in str(caught.value) for word in ("'ghost'", "'void'", "'../x'", "split 'test'"))


def test_a_single_class_on_every_image_has_nothing_to_be_told_from() -> None:
    assert "'cat', is on every train image" in warned(listed(*[["cat"]] * 30), "cat")
    assert "on every train image" not in warned(listed(*[["cat"]] * 30, []), "cat")
    assert "class 'cat' is on every tagged train image" in warned(listed(["cat"], ["cat", "dog"], None), "cat", "dog")


def test_rare_classes_and_classes_that_are_never_alone_are_named() -> None:
    text = warned(listed(*[["cat"]] * 25, *[["cat", "dog"]] * 21, ["cow"]), "cat", "dog", "cow", "sheep")
    assert "2 classes have fewer than 20 train images, too few to learn much: sheep 0, cow 1;" in text
    assert "1 class is on no train image alone, and may be taken for what is beside it: dog" in text


def test_a_data_set_without_val_says_so() -> None:
    assert "no image is of split val" in warned(listed(["cat"]), "cat")
    assert "no image is of split val" not in warned(listed(["cat"]) + listed(["cat"], split="val"), "cat")


def test_tiny_and_huge_photographs_are_counted_and_ten_are_named() -> None:
    sizes = {f"small {number:02d}": (63, 500) for number in range(12)} | {"fine": (64, 4096), "large": (10, 5000)}
    text = warned(listed(["cat"]), "cat", sizes=sizes)
    assert "13 images with a side under 64 px" in text and "'small 09', … and 3 more" in text and "'small 10'" not in text
    assert "1 image with a side over 4096 px" in text and "'fine'" not in text


def test_ten_thousand_images_are_one_image_a_line_at_most() -> None:
    listings = listed(*[[f"class {number % 200}"] for number in range(10_000)])
    seen = survey.of_listings(listings, LabelSpace(tuple(f"class {number}" for number in range(200))))
    assert len(seen.lines()) == 2 and "and 180 more" in seen.lines()[1]


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def hashes(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


HASH = st.integers(1, 2**64 - 1)


@given(st.lists(HASH, min_size=1, max_size=30), st.lists(HASH, max_size=10), st.data())
def test_banding_finds_what_comparing_all_pairs_does(train: list[int], val: list[int], data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(0, 5))):  # some that are near: any bits of any image
        flipped = data.draw(st.sets(st.integers(0, 63), max_size=6))
        val = [*val, data.draw(st.sampled_from(train)) ^ sum(1 << bit for bit in flipped)]
    index, distance = nearest(hashes(train), hashes(val))
    for row, value in enumerate(val):
        least = min((value ^ other).bit_count() for other in train)
        assert (index[row] >= 0) == (value != 0 and least <= NEAR)
        if index[row] >= 0:
            assert distance[row] == (value ^ train[index[row]]).bit_count() <= NEAR


def test_many_hashes_are_compared_without_a_matrix_of_pairs() -> None:
    rng = np.random.default_rng(0)
    train = rng.integers(1, 2**63, 100_000).astype(np.uint64)
    index, _ = nearest(train, train[::10] ^ np.uint64(0b1000100010001))
    assert (index == np.arange(0, 100_000, 10)).all()


def picture(seed: int, side: int = 96) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC)


def test_a_smaller_and_a_darker_copy_in_val_are_named_and_others_are_not() -> None:
    seen = Fingerprints()
    for seed in range(20):
        seen.add(f"train {seed}", "train", fingerprint(np.asarray(picture(seed))))
        seen.add(f"val {seed}", "val", fingerprint(np.asarray(picture(100 + seed))))
    assert seen.warnings() == []
    seen.add("small", "val", fingerprint(np.asarray(picture(3).resize((40, 40)))))
    seen.add("dark", "val", fingerprint((np.asarray(picture(5)) * 0.6).astype(np.uint8)))
    (text,) = seen.warnings()
    assert text.startswith("2 images of split val") and "'small' and 'train 3'" in text and "'dark' and 'train 5'" in text


def test_plain_images_are_like_nothing() -> None:
    assert {fingerprint(np.full((50, 60, 3), value, np.uint8)) for value in (0, 90, 255)} == {0}


# -- masks and tags ----------------------------------------------------------------------------------------------------

NAMES = ("cat", "cow", "dog", "sheep")


def agreement(values_of: dict[int, int], images: int = 60) -> MaskAgreement:
    """values_of: class index → the value that masks hold for it."""
    counts, rng = MaskAgreement(len(NAMES)), np.random.default_rng(0)
    for _ in range(images):
        tags = sorted(rng.choice(len(NAMES), rng.integers(1, 3), replace=False).tolist())
        counts.add(np.array([0, *(values_of[tag] for tag in tags), 255]), tags)
    return counts


def test_masks_that_fit_their_tags_are_not_spoken_of() -> None:
    fitting = agreement({0: 1, 1: 2, 2: 3, 3: 4})
    assert fitting.agreement() == 1 and fitting.warnings(NAMES) == []
    assert MaskAgreement(3).warnings(("a", "b", "c")) == []


def test_masks_of_a_list_that_began_with_background_are_one_value_too_high() -> None:
    (text,) = agreement({0: 2, 1: 3, 2: 4, 3: 5}).warnings(NAMES)
    assert "agree in 100% if every value but 0 and 255 were 1 value lower (as if the list of classes began with back" in text


def test_masks_of_another_order_are_given_that_order() -> None:
    (text,) = agreement({0: 3, 1: 4, 2: 1, 3: 2}).warnings(NAMES)
    assert "set `classes: [dog, sheep, cat, cow]`" in text and "1 'dog', 2 'sheep', 3 'cat', 4 'cow'" in text


def test_masks_of_other_images_fit_in_no_order() -> None:
    counts, rng = MaskAgreement(len(NAMES)), np.random.default_rng(1)
    for _ in range(200):
        counts.add(np.array([0, rng.integers(1, 5)]), [int(rng.integers(4))])
    assert "are these the masks of these images?" in counts.warnings(NAMES)[0]
