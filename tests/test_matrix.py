"""The matrix: any method takes any refiner and any segmenter, by one word in params.yaml and its section of the recipe."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pipeline import runtime
from pipeline.core import plugins, store
from pipeline.core.contracts import AffinityMethod
from tests.toys import SCRATCH, Toy, learned_fit, smp_model, toy_folder, toy_recipe

METHODS, REFINERS, SEGMENTERS = (plugins.available(kind) for kind in ("methods", "refiners", "segmenters"))
WITH_AFFINITY = {key for key in METHODS if isinstance(plugins.load("methods", key), AffinityMethod)}
CRF = {
    "iterations": 2,
    "gaussian_sxy": 1,
    "gaussian_compat": 3,
    "bilateral_sxy": 25,
    "bilateral_srgb": 13,
    "bilateral_compat": 10,
}
PAR = {"scale": 0.5, "dilations": [1, 2], "iterations": 2, "w1": 0.3, "w2": 0.01}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "crf": {"unary": "soft", "gt_prob": 0.7, "sharpness": 1.0, "crf": CRF},
    "par": {"planes": "share", "par": PAR},
    "walk": {"planes": "share", "radius": 2, "power": 2.0, "eps": 0.001, "par": PAR},
    "affinitynet": {"power": 4.0, "beta": 4.0, "steps": 8, "long_side": 512},
    "irn": {"radius": 3, "beta": 4.0, "steps": 8, "flip": True, "normalise": "class", "threshold": None, "long_side": 512},
    "segments": {"normalise": "minmax", "power": None, "uncovered": "scores"},
}
SEGMENTER_OF = {"vit": "cam", "mit": "afa", "resnet": "ppl"}  # a method whose recipe has it


def sections_of(segmenter: str) -> dict[str, Any]:
    """Sections retrain and segment of a recipe with that segmenter."""
    recipe = toy_recipe(SEGMENTER_OF.get(segmenter, "ppl"))
    if segmenter not in SEGMENTER_OF:  # no recipe has it: smp
        recipe["retrain"]["model"] = smp_model()
    return {section: recipe[section] for section in ("retrain", "segment")}


def toy_of(key: str) -> Toy:
    """A run of that method, whose score maps suit every refiner that it can have."""
    toy = Toy(Path("raw"), [key])
    toy.recipes[key]["extract"]["keep_affinity"] = key in WITH_AFFINITY
    return toy


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys with records, and a model and score maps of each method."""
    folder = tmp_path_factory.mktemp("matrix")
    toy_folder(folder / "raw", train=5, val=2)
    with pytest.MonkeyPatch.context() as patch:
        enter(patch, folder)
        toy_of("cam").write(folder)
        run("prepare", "--raw", "raw", "--records", "records.h5", "--truth", "truth.h5")
        for key in METHODS:
            toy_of(key).write(folder)
            run("train", key, "--records", "records.h5", "--init", str(SCRATCH), "--model", f"{key}/model.safetensors",
                "--log", f"{key}/log.csv")  # fmt: skip
            run("extract", key, "--records", "records.h5", "--model", f"{key}/model.safetensors", "--scoremaps",
                f"{key}/scoremaps", "--inspection", f"{key}/inspection.h5")  # fmt: skip
    return folder


def enter(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.chdir(folder)
    patch.setenv("TAG2MASK_LAUNCHER", "inline")
    patch.setenv("TAG2MASK_DEVICE", "cpu")


def invoked(stage: str, *words: str) -> Result:
    return CliRunner().invoke(import_module(f"stages.{stage}").main, list(words))


def run(stage: str, *words: str) -> None:
    result = invoked(stage, *words)
    assert result.exit_code == 0, (stage, result.output, result.exception)


def refine(key: str, refiner: str, segmenter: str) -> Path:
    """Writes the settings of that run, and its pseudo-masks into a folder of their own."""
    toy = toy_of(key)
    recipe = toy.recipes[key]
    toy.params["methods"][key] |= {"refiner": refiner, "segmenter": segmenter}
    recipe["refine"]["options"] = OPTIONS[refiner]
    learned = learned_fit(recipe["train"]["model"]["architecture"], CRF)
    recipe["fit_refiner"] = learned.get(refiner, {"threshold": {"rule": "fixed", "value": 0.3}})
    recipe |= sections_of(segmenter)
    toy.write(Path())
    out = Path(key) / refiner / segmenter
    given = ("--records", "records.h5", "--scoremaps", f"{key}/scoremaps", "--refiner", f"{out}/refiner.safetensors")
    run("fit_refiner", key, *given, "--init", str(SCRATCH))
    run("refine", key, *given, "--refined", f"{out}/refined")
    Path("corrections").mkdir(exist_ok=True)
    run("export", key, "--records", "records.h5", "--refined", f"{out}/refined", "--corrections", "corrections",
        "--pseudo-masks", f"{out}/pseudo_masks", "--exports", f"{out}/exports")  # fmt: skip
    return out


@pytest.mark.parametrize("key", METHODS)
def test_decoding_ahead_and_writing_behind_give_the_same_score_maps(
    project: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    enter(monkeypatch, project)
    toy_of(key).write(project)
    monkeypatch.setattr(runtime, "loaders", lambda device: 2)
    run("extract", key, "--records", "records.h5", "--model", f"{key}/model.safetensors", "--scoremaps", f"{key}/ahead",
        "--inspection", f"{key}/inspection-ahead.h5")  # fmt: skip
    parts = [path.name for path in sorted((project / key / "scoremaps").iterdir())]
    assert parts == [path.name for path in sorted((project / key / "ahead").iterdir())]
    for part in parts:
        assert (project / key / "scoremaps" / part).read_bytes() == (project / key / "ahead" / part).read_bytes()


@pytest.mark.parametrize("refiner", REFINERS)
@pytest.mark.parametrize("key", METHODS)
def test_any_method_takes_any_refiner(project: Path, monkeypatch: pytest.MonkeyPatch, key: str, refiner: str) -> None:
    enter(monkeypatch, project)
    if refiner == "walk" and key not in WITH_AFFINITY:
        with pytest.raises(AssertionError, match=r"keep_affinity to true in the recipe"):
            refine(key, refiner, "vit")
        return
    masks = store.Store(refine(key, refiner, "vit") / "pseudo_masks", store.PSEUDO_MASKS)
    assert len(masks.ids) == 5


@pytest.mark.parametrize("segmenter", SEGMENTERS)
@pytest.mark.parametrize("key", METHODS)
def test_any_method_takes_any_segmenter(project: Path, monkeypatch: pytest.MonkeyPatch, key: str, segmenter: str) -> None:
    enter(monkeypatch, project)
    out = refine(key, "none", segmenter)
    run("retrain", key, "--records", "records.h5", "--pseudo-masks", f"{out}/pseudo_masks", "--init", str(SCRATCH),
        "--segmenter", f"{out}/segmenter.safetensors", "--log", f"{out}/log.csv")  # fmt: skip
    run("segment", key, "--records", "records.h5", "--segmenter", f"{out}/segmenter.safetensors", "--predictions",
        f"{out}/predictions")  # fmt: skip
    run("relabel", key, "--records", "records.h5", "--segmenter", f"{out}/segmenter.safetensors", "--relabelled",
        f"{out}/relabelled")  # fmt: skip
    run("cross_validate", key, "--records", "records.h5", "--pseudo-masks", f"{out}/pseudo_masks", "--init", str(SCRATCH),
        "--held-out", f"{out}/held_out.h5")  # fmt: skip
    run("evaluate", key, "--records", "records.h5", "--truth", "truth.h5", "--scoremaps", f"{key}/scoremaps", "--refiner",
        f"{out}/refiner.safetensors", "--refined", f"{out}/refined", "--pseudo-masks", f"{out}/pseudo_masks",
        "--predictions",
        f"{out}/predictions", "--held-out", f"{out}/held_out.h5", "--relabelled", f"{out}/relabelled",
        "--metrics", f"{out}/metrics.json", "--gallery",
        f"{out}/gallery.h5", "--thresholds", f"{out}/thresholds.csv", "--per-class", f"{out}/per_class.csv", "--confusion",
        f"{out}/confusion.csv", "--images", f"{out}/images.csv",
        "--small-masks", f"{out}/small.h5", "--figures", f"{out}/figures.json")  # fmt: skip
    stages = json.loads((out / "figures.json").read_text(encoding="utf-8"))["stages"]
    assert {"score_maps", "refined", "pseudo_masks", "score_maps_val", "predictions"} <= set(stages)
    assert ("decoder_val" in stages) == (key in {"afa", "apc"})
