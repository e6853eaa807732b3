"""`python -m benchmarks.memory`: peak memory of the streaming stages for 100 and for 1,000 images. It must not grow."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.timing import mask, photograph
from pipeline.core import plugins

PROJECT = Path(__file__).resolve().parents[1]
SIDE = (96, 128)
STAGES = {
    "prepare": "--raw raw --records r.h5 --truth t.h5",
    "train": "cam --records r.h5 --init {weights}/scratch.txt --model m.safetensors --log log.csv",
    "extract": "cam --records r.h5 --model m.safetensors --scoremaps scoremaps --inspection inspection/cam.h5",
    "fit_refiner": "cam --records r.h5 --scoremaps scoremaps --init {weights}/scratch.txt --refiner s.safetensors",
    "refine": "cam --records r.h5 --scoremaps scoremaps --refiner s.safetensors --refined refined",
    "export": "cam --records r.h5 --refined refined --corrections raw/none --pseudo-masks masks --exports exports",
    "cross_validate": "cam --records r.h5 --pseudo-masks masks --init {weights}/scratch.txt --held-out h.h5",
    "retrain": "cam --records r.h5 --pseudo-masks masks --init {weights}/scratch.txt --segmenter g.safetensors "
    "--log log2.csv",
    "segment": "cam --records r.h5 --segmenter g.safetensors --predictions predictions",
    "relabel": "cam --records r.h5 --segmenter g.safetensors --relabelled relabelled",
    "evaluate": "cam --records r.h5 --truth t.h5 --scoremaps scoremaps --refiner s.safetensors --refined refined "
    "--pseudo-masks masks "
    "--predictions predictions --held-out h.h5 --relabelled relabelled --metrics metrics/cam.json "
    "--figures audit/cam.json --images audit/cam.csv --small-masks audit/cam.h5 "
    "--gallery gallery/cam.h5 --thresholds plots/cam/threshold.csv "
    "--per-class plots/cam/per_class.csv --confusion plots/cam/confusion.csv",
    "report": "--records r.h5 --metrics metrics --plots plots --gallery gallery --inspection inspection --audit audit "
    "--report report",
}
# a process counts what the one was that forked it, so a small one starts the stage
CHILD = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); "
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
)


def draw(root: Path, count: int) -> None:
    """A folder data set of `count` images, a tenth of them val."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    (root / "none").mkdir()  # no mask was mended
    rows = ["id,tags,split"]
    for index in range(count):
        found = (mask(index, SIDE) > 0).astype(np.uint8)
        Image.fromarray(photograph(index, SIDE)).save(root / "images" / f"{index:05d}.jpg")
        Image.fromarray(found).save(root / "masks" / f"{index:05d}.png")
        rows.append(f"{index:05d},blob,{'val' if index % 10 == 0 else 'train'}")
    (root / "tags.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def params(folder: Path, count: int) -> None:
    """Run cam of the scenes preset on that folder, with just enough training to have something to stream."""
    values = yaml.safe_load((PROJECT / "presets" / "scenes.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((PROJECT / values["methods"]["cam"]["recipe"]).read_text(encoding="utf-8"))
    values["dataset"] = {
        "name": "folder",
        "root": "raw",
        "options": {"images": "images", "tags": None, "classes": ["blob"], "val_share": 0.1},
    }
    values["methods"] = {"cam": values["methods"]["cam"] | {"recipe": "cam.yaml"}}
    values["export"] |= {"formats": plugins.available("exporters"), "images_per_part": 32}
    for section in ("train", "retrain"):
        recipe[section]["schedule"]["epochs"] = 100 / count
    for section in ("extract", "refine", "segment"):
        recipe[section]["images_per_part"] = 32
    recipe["cross_validate"]["folds"] = 2
    (folder / "dvc.yaml").symlink_to(PROJECT / "dvc.yaml")
    (folder / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (folder / "cam.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def peaks(count: int) -> dict[str, float]:
    """Stage → peak resident MiB of its only process."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "raw", count)
        params(folder, count)
        for stage, words in STAGES.items():
            command = [sys.executable, "-m", f"stages.{stage}", *words.format(weights=PROJECT / "data" / "weights").split()]
            variables = (
                f"PYTHONPATH={PROJECT}",
                "TAG2MASK_LAUNCHER=inline",
                "TAG2MASK_RANKS=1",
                "TAG2MASK_DEVICE=cpu",
            )
            if stage == "report":  # asks DVC for what is out of date where DVC does not run it
                variables = *variables, "DVC_STAGE=report"
            small = [sys.executable, "-S", "-c", CHILD, "env", *variables, *command]
            process = subprocess.run(small, cwd=folder, capture_output=True, text=True, check=False)
            if process.returncode:
                raise click.ClickException(f"{stage} failed on {count} images:\n{process.stderr[-2000:]}")
            found[stage] = int(process.stdout.splitlines()[-1]) / 1024
    return found


@click.command()
@click.option("--few", default=100, show_default=True)
@click.option("--many", default=1000, show_default=True)
def main(few: int, many: int) -> None:
    """Runs every stage on FEW and on MANY images and compares their peak memory."""
    first, second = peaks(few), peaks(many)
    table = Table("stage", f"{few} images, MiB", f"{many} images, MiB", "ratio")
    for stage in STAGES:
        table.add_row(stage, f"{first[stage]:.0f}", f"{second[stage]:.0f}", f"{second[stage] / first[stage]:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
