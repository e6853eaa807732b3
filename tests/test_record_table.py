"""Records as arrays: the same images as a list of objects, in a few bytes each."""

from __future__ import annotations

import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from pipeline.core import records, store
from pipeline.core.ids import Ids
from pipeline.core.labels import LabelSpace
from pipeline.core.record_table import ImageRecord, RecordsById, RecordTable
from pipeline.core.records import Records
from pipeline.jobs.engine import parts_of

LABELS = LabelSpace(("cat", "dog"))
MANY = 20_000
BYTES_PER_IMAGE = 160  # an object of its own takes 700


def record(number: int, split: str = "train", tags: tuple[int, ...] | None = (0,)) -> ImageRecord:
    return ImageRecord(
        f"{number:07d}", f"images/{number:07d}.jpg", (48, 64 + number), split, tags, bytes([number % 256] * 32)
    )


SOME = [record(3, tags=None), record(1), record(0, tags=()), record(2, "val", (0, 1))]
SHARDED = ImageRecord("in a shard", "0.tar", (4, 5), "train", (1,), bytes(32), offset=0, length=7)


def many(folder: Path) -> Path:
    splits = ("train", "val")
    path = folder / "records.h5"
    images = [record(number, splits[number % 10 == 0], (number % 2,)) for number in range(MANY)]
    records.write(path, Records(LABELS, images, ()))
    return path


def test_a_table_holds_the_records_in_the_order_of_their_ids() -> None:
    table = RecordTable.of([*SOME, SHARDED])
    assert list(table) == [SOME[2], SOME[1], SOME[3], SOME[0], SHARDED]
    assert table[-1] == SHARDED and table[-1].offset == 0 and table[0].length is None


def test_what_is_chosen_of_a_table_keeps_its_own_tags() -> None:
    table = RecordTable.of(SOME)
    assert list(table.of_split("val")) == [SOME[3]]
    assert list(table.tagged()) == [SOME[2], SOME[1], SOME[3]]
    assert list(table.with_classes()) == [SOME[1], SOME[3]]
    assert list(table.among(Ids.of(["0000003", "0000002", "unknown"]))) == [SOME[3], SOME[0]]
    assert list(table.without(Ids.of(["0000003", "0000002"]))) == [SOME[2], SOME[1]]
    assert list(table[2:].of_split("val")) == [SOME[3]] and list(table[::-2]) == [SOME[0], SOME[1]]
    assert list(table[::-1]) == [SOME[0], SOME[3], SOME[1], SOME[2]]


@pytest.mark.parametrize("cut", [slice(0, 2), slice(2, 9), slice(1, 1), slice(3, 1)])
def test_a_slice_is_the_slice_of_the_list_after_its_way_to_a_worker_too(cut: slice) -> None:
    table = RecordTable.of(SOME)
    assert list(table[cut]) == list(table)[cut] == list(pickle.loads(pickle.dumps(table[cut])))


def test_a_worker_gets_the_rows_of_its_part_alone() -> None:
    table = RecordTable.of([record(number, tags=(0, 1)) for number in range(1000)])
    assert len(pickle.dumps(parts_of(table, 10)[50])) < len(pickle.dumps(table)) / 40


def test_records_are_found_by_id_and_nothing_else_is() -> None:
    by_id = RecordsById(RecordTable.of(SOME))
    assert by_id["0000002"] == SOME[3] and list(by_id) == ["0000000", "0000001", "0000002", "0000003"]
    assert "0000004" not in by_id and None not in by_id
    with pytest.raises(KeyError, match="0000004"):
        by_id["0000004"]


@pytest.mark.parametrize("images", [[], SOME, [*SOME, SHARDED], [SHARDED]])
def test_a_file_gives_back_the_records_and_those_of_some_ids(images: list[ImageRecord], tmp_path: Path) -> None:
    records.write(tmp_path / "r.h5", Records(LABELS, images, (("x", "broken"),)))
    read = records.read(tmp_path / "r.h5")
    assert list(read) == sorted(images, key=lambda record: record.id)
    assert (read.labels, read.skipped) == (LABELS, (("x", "broken"),))
    wanted = {"0000001", "0000003", "in a shard", "unknown"}
    assert list(records.read(tmp_path / "r.h5", wanted)) == [record for record in read if record.id in wanted]
    assert list(records.read(tmp_path / "r.h5", ())) == []


def test_few_of_many_records_are_read_a_block_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = many(tmp_path)
    monkeypatch.setattr(records, "BLOCK", 999)
    wanted = {f"{number:07d}" for number in range(0, MANY, 777)}
    assert list(records.read(path, wanted)) == [record for record in records.read(path) if record.id in wanted]


def test_records_and_ids_of_a_store_take_a_few_bytes_an_image(tmp_path: Path) -> None:
    path = many(tmp_path)
    mask = {"mask": np.zeros((1, 1), np.uint8)}
    for part, ids in enumerate(parts := store.parts_of((f"{number:07d}" for number in range(MANY)), 5000)):
        store.write_part(
            store.part_path(tmp_path, part), store.PSEUDO_MASKS, ((image_id, mask) for image_id in ids), labels=LABELS,
            part=part, parts=len(parts), params_digest="", compression="none",
        )  # fmt: skip
    tracemalloc.start()
    read = records.read(path)
    masks = store.Store(tmp_path, store.PSEUDO_MASKS)
    masks.require(read.ids)
    parts = parts_of(read.table, 64)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(masks) == sum(map(len, parts)) == MANY
    assert kept / MANY < BYTES_PER_IMAGE and peak / MANY < 2 * BYTES_PER_IMAGE


def test_a_sample_does_not_depend_on_the_order_of_the_records() -> None:
    images = [record(number) for number in range(50)]
    assert records.sample(images, 7) == records.sample(reversed(images), 7)
    assert len(records.sample(images, 99)) == 50
