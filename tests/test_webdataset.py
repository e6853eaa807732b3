"""Images in tar shards, as the package webdataset writes them, are listed and read in place; hostile shards are named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset
from webdataset.writer import TarWriter

from pipeline import runtime
from pipeline.core import records as records_file
from pipeline.core.records import ChangedImageError, read_image
from pipeline.core.sections import Dataset as Section
from pipeline.core.sections import Prepare
from pipeline.datasets.webdataset import dataset as shards
from pipeline.jobs import survey
from pipeline.jobs.listings import list_images, open_dataset
from pipeline.jobs.prepare import prepare
from pipeline.listing import DatasetError

OPTIONS: dict[str, Any] = {
    "train": "train-*.tar", "val": None, "tags": "json", "key": "tags", "classes": None, "masks": "seg.png",
    "val_share": 0.2,
}  # fmt: skip


def encoded(value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3) if mode == "RGB" else size, value, np.uint8)).save(file, kind)
    return file.getvalue()


def sample(key: str, *tags: str, value: int = 0) -> dict[str, Any]:
    return {"__key__": key, "png": encoded(value), "json": {"tags": list(tags)}}


def write(path: Path, samples: Sequence[Mapping[str, Any]]) -> Path:
    """By the package's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for each in samples:
            writer.write(dict(each))
    return path


def packed(path: Path, files: Mapping[str, bytes], **kinds: bytes) -> Path:
    """A tar file of any names."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for name, kind in kinds.items():
            entry = tarfile.TarInfo(f"{name}.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    return path


def opened(root: Path, **options: Any) -> shards.Dataset:
    return open_dataset(Section(name="webdataset", root=str(root), options=OPTIONS | options))


def problems_of(root: Path, **options: Any) -> str:
    """All of them, of lists and names."""
    try:
        return "\n".join(list_images(opened(root, **options))[1])
    except DatasetError as error:
        return "\n".join(error.problems)


def test_samples_of_all_shards_are_images_with_tags_and_masks(tmp_path: Path) -> None:
    mask = np.zeros((12, 10), np.uint8)
    mask[3:6] = 2
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "PNG")
    write(tmp_path / "train-0.tar", [sample("0", "dog", "cat"), sample("1", "cat") | {"seg.png": file.getvalue()}])
    write(tmp_path / "train-1.tar", [sample("0"), {"__key__": "deep/1", "jpg": encoded(9, kind="JPEG")}])
    dataset = opened(tmp_path)
    images, problems = list_images(dataset)
    assert problems == [] and dataset.labels.names == ("cat", "dog")
    assert {image.id: image.tags for image in images} == {
        "train-0/0": ("dog", "cat"), "train-0/1": ("cat",), "train-1/0": (), "train-1/deep/1": None,
    }  # fmt: skip
    assert [image.path.as_posix() for image in images][-1] == "train-1.tar/deep/1.jpg"
    with_mask = [image for image in images if image.mask]
    assert [image.id for image in with_mask] == ["train-0/1"]
    assert np.array_equal(dataset.truth(with_mask[0]), mask)


def test_cls_counts_the_classes_from_0(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [{"__key__": "a", "png": encoded(1), "cls": 1}])
    packed(tmp_path / "train-1.tar", {"b.png": encoded(2), "b.cls": b" 0, 1\n", "c.png": encoded(3), "c.cls": b""})
    images, problems = list_images(opened(tmp_path, tags="cls", classes=["cat", "dog"]))
    assert problems == [] and [image.tags for image in images] == [("dog",), ("cat", "dog"), ()]
    assert "'7'; allowed are 0 to 0" in problems_of(
        packed(tmp_path / "train-2.tar", {"x.png": b"", "x.cls": b"7"}).parent, tags="cls", classes=["cat"]
    )


def test_shards_of_split_val_have_a_pattern_of_their_own(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [sample("0", "cat")])
    write(tmp_path / "sub/val-0.tar", [sample("0", "cat")])
    images, _ = list_images(opened(tmp_path, val="sub/val-*.tar"))
    assert {image.id: image.split for image in images} == {"train-0/0": "train", "sub/val-0/0": "val"}
    assert "train-0.tar: both dataset.options.train and val name it" in problems_of(tmp_path, val="train-*.tar")
    assert "shards there: train-0.tar" in problems_of(tmp_path, train="training-*.tar")


@pytest.mark.parametrize("on_bad_image", ["fail", "skip"])
def test_prepare_opens_images_in_their_shards_and_records_where_they_lie(
    tmp_path: Path, on_bad_image: Literal["fail", "skip"]
) -> None:
    root = tmp_path / "raw"
    broken = [{"__key__": "broken", "png": b"no image", "json": {"tags": ["cat"]}}] if on_bad_image == "skip" else []
    shard = write(root / "train-0.tar", [sample(str(number), "cat", value=number) for number in range(5)] + broken)
    settings = Section(name="webdataset", root=str(root), options=OPTIONS | {"val_share": 0.0})
    rules = Prepare(on_bad_image=on_bad_image, compression="gzip", audit_list=None)
    out = tmp_path / "records.h5"
    prepare(settings, rules, digest="", records_out=out, truth_out=tmp_path / "truth.h5", engine=runtime)
    listed = records_file.read(out)
    assert [int(read_image(record, root)[0, 0, 0]) for record in listed] == list(range(5))
    assert [image_id for image_id, _ in listed.skipped] == (["train-0/broken"] if broken else [])
    write(shard, [sample(str(number), "cat", value=number + 1) for number in range(5)])
    with pytest.raises(ChangedImageError, match=r"train-0.tar/0.png has changed"):
        read_image(listed.table[0], root)
    shard.unlink()
    with pytest.raises(ChangedImageError, match=r"train-0.tar/0.png is gone"):
        read_image(listed.table[0], root)


def test_a_survey_sees_sizes_in_shards(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [sample("0", "cat"), sample("1", "cat")])
    sizes = survey.of(tmp_path, Section(name="webdataset", root="", options=OPTIONS)).sizes
    assert sizes is not None and sizes.median == (12, 10)


def test_every_problem_of_shards_is_listed_at_once(tmp_path: Path) -> None:
    image = encoded(1)
    packed(
        tmp_path / "train-0.tar",
        {
            "../out.png": image, "/abs.png": image, "back\\slash.png": image, "two.png": image, "two.jpg": image,
            "twice.png": image, "other.png": image, "twice.json": b"{}", "same.png": image, "./same.png": image,
            "tags.png": image, "tags.json": b'{"tags": "cat,dog"}', "list.png": image, "list.json": b"[]",
            "deep.png": image, "deep.json": b"[" * 100_000, "number.png": image, "number.json": b'{"tags": [3]}',
            "large.png": image, "large.json": b" " * (2**20 + 1),
        },
        link=tarfile.SYMTYPE, hard=tarfile.LNKTYPE, device=tarfile.CHRTYPE, pipe=tarfile.FIFOTYPE,
    )  # fmt: skip
    write(tmp_path / "train-1.tar", [sample("fine", "cat")])
    text = problems_of(tmp_path)
    for words in (
        "'../out'", "'/abs'", r"'back\\slash'", "'train-0/two': 2 images (png, jpg)", "'twice' comes twice",
        "'tags.json'", "'cat,dog'; allowed is a list of names", "list.json in train-0.tar is no JSON object",
        "'train-0/deep': deep.json", "the tag 3; allowed are names", "1,048,577 bytes; at most 1,048,576",
        "'link.png' is no file but a link", "'hard.png' is no file", "'device.png'", "'pipe.png'",
    ):  # fmt: skip
        assert words.replace("'tags.json'", "tags.json") in text, words


def test_duplicate_names_within_a_sample_are_an_error(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for _ in range(2):
            entry = tarfile.TarInfo("a.png")
            tar.addfile(entry, io.BytesIO(b""))
    assert "'a.png' comes twice" in problems_of(tmp_path, classes=["cat"])


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_shard_that_was_cut_off_is_an_error(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path / "train-0.tar", [sample(str(number), "cat") for number in range(20)])
    with tarfile.open(path) as tar:
        end = max(entry.offset_data + entry.size for entry in tar)
    path.write_bytes(path.read_bytes()[: int(end * kept) // 2 * 2 + 1])
    assert "train-0.tar is damaged" in problems_of(tmp_path)


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = write(tmp_path / "train-0.tar", [sample(str(number), "cat") for number in range(4)])
    with tarfile.open(path) as tar:
        third = sorted(entry.offset for entry in tar)[2]
    data = bytearray(path.read_bytes())
    data[third : third + 100] = b"x" * 100
    path.write_bytes(data)
    assert f"train-0.tar is damaged at byte {third:,}" in problems_of(tmp_path)


def test_packed_shards_and_what_is_no_tar_file_are_named(tmp_path: Path) -> None:
    plain = write(tmp_path / "train-0.tar", [sample("0", "cat")])
    (tmp_path / "train-1.tar").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "train-2.tar").write_bytes(b"\x89PNG, and nothing more" * 99)
    text = problems_of(tmp_path)
    assert "train-1.tar is compressed (gzip); images are read in place: unpack it" in text
    assert "train-2.tar is damaged or no tar file" in text


def test_a_shard_that_is_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    outside = write(tmp_path / "elsewhere/a.tar", [sample("0", "cat")])
    (tmp_path / "root").mkdir()
    (tmp_path / "root/train-0.tar").symlink_to(outside)
    assert "'train-0.tar' is a link that leads out of" in problems_of(tmp_path / "root")


def test_what_is_not_read_is_told_and_hidden_files_are_skipped(tmp_path: Path) -> None:
    packed(
        tmp_path / "train-0.tar",
        {
            "__meta__.json": b"{}", "._a.png": b"", "a.png": encoded(1), "a.json": b'{"tags": "cat"}', "a.txt": b"",
            "b.json": b"{}",
        },
    )  # fmt: skip
    dataset = opened(tmp_path)
    assert [image.id for image in list_images(dataset)[0]] == ["train-0/a"]
    assert dataset.warnings[0] == "1 sample without an image left out" and dataset.warnings[1].startswith("1 .txt in shards")


def test_no_tags_under_the_key_name_the_key(tmp_path: Path) -> None:
    write(tmp_path / "train-0.tar", [sample("0", "cat")])
    assert "no sample has a tag; dataset.options.key 'labels' must name them" in problems_of(tmp_path, key="labels")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train": "../train-*.tar"}, "train: got"),
        ({"train": "/data/train.tar"}, "train: got"),
        ({"train": "train-{000..146}.tar"}, r"with `\*` for the parts that differ"),
        ({"val": "val"}, "val: got 'val'"),
        ({"tags": "cls"}, "classes: got null"),
        ({"tags": "txt"}, "tags"),
    ],
)
def test_options_that_cannot_be_used_say_what_is_allowed(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        opened(tmp_path, **options)


def test_the_package_reads_the_samples_that_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "train-0.tar", [sample(f"{number:03d}", "cat") for number in range(3)])
    samples = list(WebDataset(str(path), shardshuffle=False))
    images, _ = list_images(opened(tmp_path))
    assert [image.id for image in images] == [f"train-0/{each['__key__']}" for each in samples]
    assert [list(image.tags or ()) for image in images] == [json.loads(each["json"])["tags"] for each in samples]
