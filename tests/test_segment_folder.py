"""`segment_folder`: a trained segmenter on any folder, outside the DAG."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from pipeline.core import records, store
from pipeline.core.labels import LabelSpace
from pipeline.imaging.palette import voc_palette
from pipeline.jobs import segment_folder
from stages import segment
from stages import segment_folder as command
from tests.test_segment import picture, project, save, small

__all__ = ["project"]  # the fixture: a folder with params.yaml and an untrained segmenter


@pytest.fixture
def folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project with artifacts/cam/segmenter.safetensors and nothing else that the DAG makes."""
    monkeypatch.setenv("TAG2MASK_WORKERS", "1")
    monkeypatch.setenv("TAG2MASK_DEVICE", "cpu")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    (project / "artifacts" / "cam").mkdir(parents=True)
    (project / "segmenter.safetensors").rename(project / "artifacts" / "cam" / "segmenter.safetensors")
    (project / "records.h5").unlink()
    shutil.rmtree(project / "raw")
    (project / "in" / "deep er" / "größe").mkdir(parents=True)
    return project


def run(*more: str) -> Result:
    return CliRunner().invoke(command.main, ["cam", "--images", "in", "--out", "out", *more])


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_kind_of_image_gets_a_mask_and_an_overlay_of_its_upright_size(folder: Path) -> None:
    base, upright = Image.fromarray(picture(24, 40)), Image.Exif()
    upright[274] = 6  # to be turned by a quarter
    base.save(folder / "in" / "a b.png")
    base.save(folder / "in" / "deep er" / "größe" / "größe.JPG", "JPEG", exif=upright)
    base.convert("L").save(folder / "in" / "grey.png")
    base.convert("CMYK").save(folder / "in" / "cmyk.tif")
    Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257).save(folder / "in" / "sixteen.png")
    Image.new("RGBA", (1, 1)).save(folder / "in" / "one.webp")
    (folder / "in" / ".hidden.png").write_bytes(b"")
    (folder / "in" / "notes.txt").write_text("no image")
    assert (result := run()).exit_code == 0, result.output
    sizes = {
        "a b": (24, 40),
        "deep er/größe/größe": (40, 24),
        "grey": (24, 40),
        "cmyk": (24, 40),
        "sixteen": (24, 40),
        "one": (1, 1),
    }
    written = {name for name in files(folder / "out") if name != "segmented.json"}
    assert written == {f"masks/{name}.png" for name in sizes} | {f"overlays/{name}.jpg" for name in sizes}
    for name, size in sizes.items():
        with (
            Image.open(folder / "out" / "masks" / f"{name}.png") as mask,
            Image.open(folder / "out/overlays" / f"{name}.jpg") as overlay,
        ):
            assert mask.mode == "P" and mask.size[::-1] == overlay.size[::-1] == size
            assert np.asarray(mask).max() <= 2 and mask.getpalette() == voc_palette().ravel().tolist()
    description = json.loads((folder / "out" / "segmented.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in description["classes"]] == ["background", "disc", "square", "ignore"]


def test_the_mask_is_what_the_stage_of_the_dag_predicts(folder: Path) -> None:
    data = picture(31, 23)
    Image.fromarray(data).save(folder / "in" / "x.png")
    sha256 = hashlib.sha256((folder / "in" / "x.png").read_bytes()).digest()
    record = records.ImageRecord("x", "../in/x.png", (31, 23), "val", None, sha256)
    (folder / "raw").mkdir()
    records.write(folder / "records.h5", records.Records(LabelSpace(("disc", "square")), (record,), ()))
    words = ["--records", "records.h5", "--segmenter", "artifacts/cam/segmenter.safetensors", "--predictions", "predictions"]
    assert (result := CliRunner().invoke(segment.main, ["cam", *words])).exit_code == 0, result.output
    assert run().exit_code == 0
    label = store.Store(folder / "predictions", store.PREDICTIONS)["x"]["label"]
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "out" / "masks" / "x.png")), label)


def test_broken_images_are_listed_at_the_end_and_do_not_stop_the_others(folder: Path) -> None:
    for name in ("a.jpg", "z.jpg"):
        Image.fromarray(picture(64, 64)).save(folder / "in" / name)
    whole = (folder / "in" / "a.jpg").read_bytes()
    (folder / "in" / "cut <script>.jpg").write_bytes(whole[:-30])
    (folder / "in" / "empty.png").write_bytes(b"")
    result = run()
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[-3].startswith("'cut <script>.jpg' cannot be read: image file is truncated")
    assert lines[-2] == "'empty.png' cannot be read: not a known image format"
    assert lines[-1] == "2 masks and overlays written to out; 2 images could not be read"
    assert sorted(files(folder / "out" / "masks")) == ["a.png", "z.png"]


def test_existing_masks_are_kept_and_another_segmenter_needs_overwrite(folder: Path) -> None:
    for name in ("a", "b"):
        Image.fromarray(picture(20, 20)).save(folder / "in" / f"{name}.png")
    assert run().exit_code == 0
    first = files(folder / "out")
    (folder / "out" / "masks" / "a.png").write_bytes(b"kept")
    (folder / "out" / "overlays" / "b.jpg").unlink()  # as after a kill
    assert run().exit_code == 0
    second = files(folder / "out")
    assert second["masks/a.png"] == b"kept" and second["overlays/b.jpg"] == first["overlays/b.jpg"]
    other = small()
    with torch.no_grad():
        next(iter(other.parameters())).add_(1.0)
    save(folder / "artifacts" / "cam" / "segmenter.safetensors", other, LabelSpace(("disc", "square")))
    result = run()
    assert result.exit_code == 1 and "masks of 2 of these images" in result.output and "add --overwrite" in result.output
    assert files(folder / "out") == second
    assert run("--overwrite").exit_code == 0
    assert files(folder / "out")["masks/a.png"] != b"kept"


def test_processes_and_loaders_write_the_same_bytes_and_name_the_same_broken_image(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(10):
        Image.fromarray(picture(20 + number, 30)).save(folder / "in" / f"{number}.png")
    (folder / "in" / "4.png").write_bytes(b"")
    first = run()
    contents = files(folder / "out")
    assert first.exit_code == 1 and len(files(folder / "out" / "masks")) == 9
    for workers, loaders in (("2", "0"), ("1", "1")):
        shutil.rmtree(folder / "out")
        monkeypatch.setenv("TAG2MASK_WORKERS", workers)
        monkeypatch.setenv("TAG2MASK_LOADERS", loaders)
        again = run()
        assert again.output.splitlines()[-2:] == first.output.splitlines()[-2:]
        assert files(folder / "out") == contents


def test_images_that_share_a_stem_keep_their_suffixes(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        (tmp_path / name).write_bytes(b"")
    masks = {str(target.source): str(target.mask) for target in segment_folder.targets(tmp_path, Path("out"))}
    assert masks == {"a.jpg": "out/masks/a.jpg.png", "a.png": "out/masks/a.png.png", "b.jpg": "out/masks/b.png"}


def test_wrong_arguments_are_reported_before_any_work(folder: Path) -> None:
    assert "holds no image" in run().output
    Image.fromarray(picture(8, 8)).save(folder / "in" / "x.png")
    inside = CliRunner().invoke(command.main, ["cam", "--images", "in", "--out", "in/out"])
    assert inside.exit_code == 1 and "lies in --images in" in inside.output
    missing = CliRunner().invoke(command.main, ["cam", "--images", "nowhere", "--out", "out"])
    assert missing.exit_code == 1 and "folder nowhere is missing" in missing.output
    weights = run("--segmenter", "no.safetensors")
    assert weights.exit_code == 1 and "no.safetensors is missing; train it by `dvc repro`" in weights.output
    for words in (["--images", "in"], ["--images", "in", "--out", "out", "--records", "r.h5"], [], ["--overwrite"]):
        assert CliRunner().invoke(command.main, ["cam", *words]).exit_code == 2
    assert not (folder / "out").exists()


def test_an_overlay_tints_classes_and_leaves_background_and_is_bounded() -> None:
    image, mask = np.full((30, 20, 3), 100, np.uint8), np.zeros((30, 20), np.uint8)
    mask[10:20] = 1
    overlay = segment_folder.overlay(image, mask)
    assert (overlay[:9] == 100).all() and (overlay[12:18] == (100 + voc_palette()[1]) // 2).all()
    assert segment_folder.overlay(np.zeros((5000, 10, 3), np.uint8), np.zeros((5000, 10), np.uint8)).shape == (2048, 4, 3)
