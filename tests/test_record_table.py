"""Records of images as columns: what a list of records would give, at a fraction of its memory."""

from __future__ import annotations

import hashlib
import io
import pickle
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.core import records as records_file
from pipeline.core.ids import Ids
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import ImageRecord, Parts, RecordTable
from pipeline.core.records import Records

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8)
IMAGES = st.lists(
    st.builds(
        ImageRecord,
        id=NAMES,
        path=NAMES,
        size=st.tuples(st.integers(1, 70_000), st.integers(1, 70_000)),
        split=st.sampled_from(["train", "val"]),
        tags=st.none() | st.sets(st.integers(0, 300), max_size=4).map(sorted).map(tuple),
        sha256=st.binary(min_size=32, max_size=32),
    ),
    max_size=12,
    unique_by=lambda record: record.id,
)


def by_id(images: list[ImageRecord]) -> list[ImageRecord]:
    return sorted(images, key=lambda record: record.id)


@given(IMAGES)
def test_a_table_gives_back_the_records_in_the_order_of_their_ids(images: list[ImageRecord]) -> None:
    table = RecordTable.of(images)
    assert list(table) == by_id(images) and list(table.ids) == [record.id for record in by_id(images)]
    assert list(pickle.loads(pickle.dumps(table))) == list(table)


@given(IMAGES, st.integers(0, 12), st.integers(0, 12))
def test_a_slice_is_what_a_list_gives(images: list[ImageRecord], start: int, stop: int) -> None:
    table, whole = RecordTable.of(images), by_id(images)
    for step in (1, 2, -1):
        assert list(table[start:stop:step]) == whole[start:stop:step]
        assert list(pickle.loads(pickle.dumps(table[start:stop:step]))) == whole[start:stop:step]
    assert list(table[start:][:stop]) == whole[start:][:stop]


@given(IMAGES)
def test_images_are_chosen_by_split_tags_and_ids(images: list[ImageRecord]) -> None:
    table, whole = RecordTable.of(images), by_id(images)
    assert list(table.of_split("val")) == [record for record in whole if record.split == "val"]
    assert list(table.tagged()) == [record for record in whole if record.tags is not None]
    assert list(table.with_classes().of_split("train")) == [r for r in whole if r.tags and r.split == "train"]
    chosen = [record.id for record in whole[::2]]
    assert [record.id for record in table.among(Ids.of([*chosen, "an id of no image"]))] == chosen
    assert list(table.without(Ids.of([*chosen, "an id of no image"]))) == whole[1::2]


@given(IMAGES, st.integers(1, 5))
def test_parts_hold_every_image_once_and_no_images_are_one_empty_part(images: list[ImageRecord], size: int) -> None:
    parts = Parts(RecordTable.of(images), size)
    assert len(parts) == max(1, -(-len(images) // size))
    assert [record for part in parts for record in part] == by_id(images)
    assert all(len(part) == size for part in parts[:-1])


@given(IMAGES)
def test_images_by_id_are_a_mapping_in_id_order(images: list[ImageRecord]) -> None:
    mapping = Records(LabelSpace(("cat",)), images, ()).by_id()
    assert dict(mapping) == {record.id: record for record in images}
    assert list(mapping) == [record.id for record in by_id(images)]
    assert "an id of no image" not in mapping and mapping.get("an id of no image") is None


def test_there_is_no_record_beyond_the_ends() -> None:
    table = RecordTable.of([ImageRecord("a", "a.png", (1, 1), "train", (), b"\0" * 32)])
    assert table[-1] == table[0]
    for index in (1, -2):
        with pytest.raises(IndexError):
            table[index]
    with pytest.raises(KeyError):
        Records(LabelSpace(("cat",)), table, ()).by_id()["b"]


@given(images=IMAGES, offset=st.integers(0, 2**40), length=st.integers(1, 2**40))
def test_records_of_images_in_shards_come_back_from_their_file(
    tmp_path_factory: pytest.TempPathFactory, images: list[ImageRecord], offset: int, length: int
) -> None:
    path = tmp_path_factory.mktemp("records") / "records.h5"
    sharded = [replace(record, offset=offset, length=length) for record in images]
    for listed in (images, sharded):
        records_file.write(path, Records(LabelSpace(("cat",)), listed, (("broken", "why"),)))
        read = records_file.read(path)
        assert list(read) == by_id(listed) and read.skipped == (("broken", "why"),)


def test_few_of_many_records_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [
        ImageRecord(f"{number:04d}", f"{number}.jpg", (1, number), "train", tuple(range(number % 3)), b"\1" * 32)
        for number in range(1000)
    ]
    records_file.write(tmp_path / "records.h5", Records(LabelSpace(("cat",)), images, ()))
    monkeypatch.setattr(records_file, "BLOCK", 99)
    for wanted in ([], images[7:400:37], images):
        assert list(records_file.read(tmp_path / "records.h5", {"none", *(r.id for r in wanted)})) == wanted


def test_a_record_costs_a_hundred_bytes_however_many_there_are(tmp_path: Path) -> None:
    """A list of them takes some 700 bytes a record; a million is a benchmark, `python -m benchmarks.many_images`."""
    count = 20_000
    table = RecordTable.of(
        ImageRecord(f"{number:08d}", f"images/{number:08d}.jpg", (480, 640), "train", (number % 20,), b"\1" * 32)
        for number in range(count)
    )
    records_file.write(tmp_path / "records.h5", Records(LabelSpace(("cat",)), table, ()))
    tracemalloc.start()
    try:
        read = records_file.read(tmp_path / "records.h5")
        parts = Parts(read.table, 16)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(parts) == 1250 and kept < 100 * count and peak < 250 * count
    assert len(pickle.dumps(parts[-1])) < 16 * 150 + 1500  # a worker is sent its part alone


def test_a_worker_gets_the_rows_of_its_part_and_no_more() -> None:
    columns = RecordTable.of(
        ImageRecord(f"{number:04d}", "x", (1, 1), "train", tuple(range(number % 3)), b"\1" * 32) for number in range(1000)
    )
    assert len(pickle.dumps(columns[500:510])) < len(pickle.dumps(columns)) / 20
    assert np.array_equal(pickle.loads(pickle.dumps(columns[500:510])).tags_offset[:1], [0])


def test_an_image_inside_of_a_shard_is_read_by_its_place_and_checked(tmp_path: Path) -> None:
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data, before = buffer.getvalue(), b"a header of the shard"
    (tmp_path / "0.tar").write_bytes(before + data + b"the next image")
    record = ImageRecord("a", "0.tar", (4, 5), "train", (), hashlib.sha256(data).digest(), len(before), len(data))
    assert np.array_equal(records_file.read_image(record, tmp_path), pixels)
    for moved in (replace(record, offset=0), replace(record, length=len(data) + 99)):  # the shard was written anew
        with pytest.raises(records_file.ChangedImageError, match="has changed since prepare"):
            records_file.read_image(moved, tmp_path)
