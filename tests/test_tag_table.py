"""Tables of tags read the same however their columns are called and separated; what is not clear is refused."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import class_names
from pipeline.listing import DatasetError
from pipeline.tag_table import MEANINGS, read_table, split_tags

ROWS = [("a", "cat dog", "train"), ("summer 23/b.jpg", "", "val"), ("größe", "sheep", "")]


def written(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]], separator: str, start: bytes = b"") -> Path:
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([header, *rows])
    path.write_bytes(start + text.getvalue().encode())
    return path


def problem_of(path: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        read_table(path, ["id", "tags"])
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def spelt(name: str) -> st.SearchStrategy[str]:
    """A name of a column as people write it: any case, spaces or hyphens between and around its words."""
    cased = st.sampled_from([str.upper, str.lower, str.title]).map(lambda case: case(name))
    joined = st.tuples(cased, st.sampled_from("_ -")).map(lambda pair: pair[0].replace("_", pair[1]))
    return st.tuples(st.sampled_from(["", " "]), joined).map("".join)


HEADERS = st.tuples(*(st.sampled_from(names).flatmap(spelt) for names in MEANINGS.values()))


@given(header=HEADERS, order=st.permutations(range(3)), separator=st.sampled_from(",;\t"), bom=st.booleans())
def test_any_spelling_order_and_separator_reads_the_same(
    header: tuple[str, ...], order: list[int], separator: str, bom: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = [[row[column] for column in order] for row in ROWS]
        start = b"\xef\xbb\xbf" if bom else b""
        path = written(Path(folder) / "t.csv", [header[column] for column in order], rows, separator, start)
        assert read_table(path, ["id", "tags"]) == [dict(zip(("id", "tags", "split"), row, strict=True)) for row in ROWS]


def test_columns_that_mean_nothing_keep_their_names(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", ["image", "Camera", "label"], [["a", "left", "cat"]], ";")
    assert read_table(path, ["id", "tags"]) == [{"id": "a", "Camera": "left", "tags": "cat"}]


def test_two_columns_that_mean_tags_are_both_named(tmp_path: Path) -> None:
    text = problem_of(written(tmp_path / "t.csv", ["id", "Tags", "classes"], [["a", "x", "y"]], ","))
    assert "'Tags' and 'classes' both mean tags" in text


def test_a_table_without_header_is_told_what_it_must_begin_with(tmp_path: Path) -> None:
    text = problem_of(written(tmp_path / "t.csv", ["a.jpg", "cat"], [["b.jpg", "dog"]], ","))
    assert "'a.jpg, cat'" in text and "`id,tags`" in text and "filename" in text and "labels" in text


@given(st.lists(st.lists(st.sampled_from(["cat", "dog", "sheep"]), unique=True, max_size=3), min_size=1))
def test_any_clear_separator_of_tags_reads_the_same(rows: list[list[str]]) -> None:
    expected = [tuple(row) for row in rows]
    assert all(split_tags(mark.join(row) for row in rows) == expected for mark in ("; ", ";", "|", ",", ", ", " "))


def test_two_separators_in_a_column_are_refused_with_the_cells() -> None:
    with pytest.raises(DatasetError) as caught:
        split_tags(["cat;dog", "cat,sheep", "cat|cow", "cow"])
    assert ["'cat,sheep'" in caught.value.problems[0], "'cat|cow'" in caught.value.problems[1]] == [True, True]


def test_a_known_name_stays_whole() -> None:
    assert split_tags(["hot dog", "cat, wild; hot dog", "cat, wild"], ["hot dog", "cat, wild"]) == [
        ("hot dog",),
        ("cat, wild", "hot dog"),
        ("cat, wild",),
    ]


# -- names of classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["background", "Background", "_background_", "ignore", "VOID", "unlabeled", "unlabelled"])
def test_names_of_what_masks_hold_by_themselves_are_refused(name: str) -> None:
    (text,) = class_names.problems(["cat", name])
    assert repr(name) in text and "reserved" in text and ("background by themselves" in text or "255" in text)


@pytest.mark.parametrize("name", ["x" * 300, "a\nb", "a\tb", "../x", "a/b", "a\\b", "..", " "])
def test_names_that_cannot_be_names_of_files_are_refused(name: str) -> None:
    assert len(class_names.problems(["cat", name])) == 1


@pytest.mark.parametrize("name", ["größe", "hot dog", "<b>|x", "می‌روم", "cat, wild", "T-shirt", "grounds"])
def test_ordinary_names_are_fine(name: str) -> None:
    assert class_names.problems([name, "cat"]) == []


def test_all_bad_names_are_named_at_once() -> None:
    texts = "\n".join(class_names.problems(["void", "../x", "cat", "cat", *map(str, range(300))]))
    assert all(words in texts for words in ("'void'", "'../x'", "'cat' stands twice", "303 classes"))


def test_the_same_name_in_another_case_is_named_however_many_images_have_it() -> None:
    (text,) = class_names.warnings({"cat": 50, "CAT": 49, "dog": 3})
    assert "'CAT' (49 images) stands beside 'cat' (50)" in text


def test_names_that_are_alike_are_named_only_where_one_is_rare() -> None:
    texts = "\n".join(class_names.warnings({"person": 100, "persons": 2, "preson": 1, "cow": 40, "crow": 30}))
    assert "'persons' (2 images) stands beside 'person'" in texts and "'preson' (1 image)" in texts and "crow" not in texts


def test_a_name_made_of_others_is_named_and_hot_dog_is_not() -> None:
    (text,) = class_names.warnings(dict.fromkeys(["cow", "dog", "hot dog", "cow person", "dog person", "teddy bear"], 30))
    assert "'cow person', 'dog person'" in text and "hot dog" not in text


def test_the_nearest_name_is_found_in_any_case() -> None:
    assert class_names.nearest("CAT", ["cow", "cat"]) == "cat" and class_names.nearest("preson", ["person"]) == "person"
    assert class_names.nearest("zebra", ["cat", "dog"]) is None
