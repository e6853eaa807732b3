"""The HDF5 store: arrays are read as they were written, bytes are reproducible, and damage is named."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.core.store import Store, StoreError, Workspace

LABELS = LabelSpace(("cat", "größer hund"))


def write(folder: Path, masks: dict[str, np.ndarray], per_part: int = 2, schema: store.Schema = store.PSEUDO_MASKS) -> Path:
    parts = store.parts_of(masks, per_part)
    for number, ids in enumerate(parts):
        items = ((image_id, {"mask": masks[image_id]}) for image_id in ids)
        store.write_part(
            store.part_path(folder, number),
            schema,
            items,
            labels=LABELS,
            part=number,
            parts=len(parts),
            params_digest="p",
            compression="gzip",
        )
    return folder


def random_masks(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"id {number} ü/..": rng.integers(0, 3, rng.integers(1, 30, 2), dtype=np.uint8) for number in range(count)}


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 7), per_part=st.integers(1, 4), seed=st.integers(0, 99))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, count: int, per_part: int, seed: int) -> None:
    masks = random_masks(count, seed)
    read = Store(write(tmp_path_factory.mktemp("s"), masks, per_part), store.PSEUDO_MASKS)
    assert read.ids == sorted(masks) and len(read) == count and read.labels == LABELS
    for image_id, mask in masks.items():
        np.testing.assert_array_equal(read[image_id]["mask"], mask)


@pytest.mark.parametrize(("count", "block"), [(0, 3), (1, 1), (7, 3), (7, 100)])
def test_a_store_of_one_part_is_streamed_in_order(tmp_path: Path, count: int, block: int) -> None:
    masks = random_masks(count)
    path = store.part_path(write(tmp_path, masks, 100), 0)
    streamed = list(store.stream(path, store.PSEUDO_MASKS, block))
    assert [image_id for image_id, _ in streamed] == sorted(masks)
    for image_id, fields in streamed:
        np.testing.assert_array_equal(fields["mask"], masks[image_id])
    with pytest.raises(StoreError, match="schema pseudo_masks version 1, expected small_masks version 1"):
        next(store.stream(path, store.SMALL_MASKS))
    with pytest.raises(StoreError, match=r"nothing\.h5 is missing"):
        next(store.stream(tmp_path / "nothing.h5", store.PSEUDO_MASKS))


def test_the_same_items_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, random_masks(5)) for name in "ab")
    assert [path.read_bytes() for path in sorted(first.iterdir())] == [
        path.read_bytes() for path in sorted(second.iterdir())
    ]


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, random_masks(6))
    store.part_path(folder, 1).unlink()
    with pytest.raises(StoreError, match=r"these are missing: \[1\]"):
        Store(folder, store.PSEUDO_MASKS)


def test_an_empty_folder_and_another_schema_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no parts"):
        Store(tmp_path, store.PSEUDO_MASKS)
    with pytest.raises(StoreError, match="expected truth version 1"):
        Store(write(tmp_path, random_masks(1)), store.TRUTH)


def test_missing_extra_and_unknown_ids_are_named(tmp_path: Path) -> None:
    masks = Store(write(tmp_path, random_masks(2)), store.PSEUDO_MASKS)
    with pytest.raises(StoreError, match=r"1 ids are missing \['new'\], 1 are not expected \['id 1"):
        masks.require([masks.ids[0], "new"])
    with pytest.raises(StoreError, match="no id 'nobody'"):
        masks["nobody"]


def test_flipped_bits_are_found_and_named(tmp_path: Path) -> None:
    folder = write(tmp_path, {"a": np.random.default_rng(0).integers(0, 255, (200, 200), dtype=np.uint8)})
    path = store.part_path(folder, 0)
    with h5py.File(path, "r") as file:
        chunk = file["mask"]["data"].id.get_chunk_info(0)  # type: ignore[index]
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset + chunk.size // 2] ^= 0xFF
    path.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="'a' mask is damaged"):
        Store(folder, store.PSEUDO_MASKS)["a"]


def test_unsorted_ids_wrong_fields_and_axes_that_disagree_are_refused(tmp_path: Path) -> None:
    def part(items: list[store.Item], schema: store.Schema = store.PSEUDO_MASKS) -> None:
        store.write_part(
            tmp_path / "p.h5", schema, items, labels=LABELS, part=0, parts=1, params_digest="", compression="none"
        )

    mask = np.zeros((2, 2), np.uint8)
    with pytest.raises(StoreError, match="sorted and unique"):
        part([("b", {"mask": mask}), ("a", {"mask": mask})])
    with pytest.raises(StoreError, match="has fields"):
        part([("a", {"label": mask})])
    with pytest.raises(StoreError, match="has shape"):
        part([("a", {"mask": mask[0]})])
    with pytest.raises(StoreError, match="along h"):
        part([("a", {"label": mask, "confidence": mask[:1], "disagree": mask})], store.REFINED)
    assert not (tmp_path / "p.h5").exists()


def test_a_workspace_survives_an_error_and_is_gone_after_success(tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / ".work"
    with pytest.raises(RuntimeError), Workspace(out, "key", root) as work:
        (work.result / "half").write_text("1")
        raise RuntimeError
    assert not out.exists()
    with Workspace(out, "key", root) as work:
        assert (work.result / "half").read_text() == "1"
    assert (out / "half").exists() and not list(root.iterdir())


@given(st.text(min_size=1, max_size=20))
def test_any_id_becomes_a_file_name_that_stays_in_its_folder(image_id: str) -> None:
    try:
        image_id.encode("utf-8")
    except UnicodeEncodeError:
        return
    stem = records.file_stem(image_id)
    assert stem and "/" not in stem and "\\" not in stem and not stem.startswith(".") and stem.isprintable()
    from urllib.parse import unquote_to_bytes

    assert unquote_to_bytes(stem).decode("utf-8") == image_id


def test_class_names_must_be_few_and_different() -> None:
    with pytest.raises(ValueError, match="stand twice: cat"):
        LabelSpace(("cat", "dog", "cat"))
    with pytest.raises(ValueError, match="between 1 and 254"):
        LabelSpace(tuple(map(str, range(255))))


def test_threads_share_a_store_of_more_parts_than_are_kept_open(tmp_path: Path) -> None:
    masks = {f"{number:03d}": np.full((40, 40), number, np.uint8) for number in range(64)}
    folder = write(tmp_path, masks, per_part=8)
    for seed in range(10):
        opened, order = Store(folder, store.PSEUDO_MASKS), np.random.default_rng(seed)
        draws = [f"{number:03d}" for number in order.integers(0, 64, 400)]
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda image_id, opened=opened: opened.read(image_id, "mask"), draws))
        assert all(np.array_equal(mask, masks[image_id]) for image_id, mask in zip(draws, read, strict=True))


def test_a_reader_opens_the_parts_of_its_own_images_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, {f"{number:03d}": np.zeros((2, 2), np.uint8) for number in range(64)}, per_part=1)
    store.part_path(folder, 20).write_bytes(b"damaged")
    opened = Store(folder, store.PSEUDO_MASKS)
    assert "050" in opened and opened["063"]["mask"].shape == (2, 2) and "nobody" not in opened
    with pytest.raises(StoreError, match=r"part-00020\.h5 cannot be opened"):
        opened.require(["050"])


def test_a_store_is_pickled_without_what_it_has_open(tmp_path: Path) -> None:
    masks = random_masks(5)
    opened = Store(write(tmp_path, masks), store.PSEUDO_MASKS)
    opened.require(masks)
    copy = pickle.loads(pickle.dumps(opened))
    assert copy.ids == sorted(masks) and copy.logical_digest == opened.logical_digest


def test_parts_whose_ids_are_out_of_order_are_refused(tmp_path: Path) -> None:
    for part, image_id in enumerate(("b", "a")):
        items = [(image_id, {"mask": np.zeros((1, 1), np.uint8)})]
        store.write_part(
            store.part_path(tmp_path, part), store.PSEUDO_MASKS, items, labels=LABELS, part=part, parts=2, params_digest="",
            compression="none",
        )  # fmt: skip
    with pytest.raises(StoreError, match=r"part-00001\.h5: its ids do not follow"):
        Store(tmp_path, store.PSEUDO_MASKS).require(["a", "b"])
