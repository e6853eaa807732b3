"""A copy of the project with toy data, for tests that run DVC."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from tests.toys import PROJECT, Toy, toy_folder

WEIGHTS = dict.fromkeys(("init", "segmenter_init"), "data/weights/scratch.txt")
COPIED = ("pipeline", "stages", "dvc.yaml", "pyproject.toml", ".dvcignore", ".gitignore")


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": ".", "TAG2MASK_DEVICE": "cpu", **more}


class Copy:
    """A copy of the project with toy data, params and recipes, under git and DVC."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            source = PROJECT / name
            if source.is_dir():
                shutil.copytree(source, folder / name)  # with compiled modules, which know their files by time and size
            else:
                shutil.copy(source, folder / name)
        (folder / "data" / "weights").mkdir(parents=True)
        (folder / "data" / "corrections").mkdir()
        (folder / "data" / "tags").mkdir()
        shutil.copy(PROJECT / "data" / "weights" / "scratch.txt", folder / "data" / "weights")
        toy_folder(folder / "raw", train=9, val=3)
        self.toy = Toy(Path("raw"))
        self.toy.params["methods"]["cam"] |= WEIGHTS
        self.toy.recipes["cam"]["cross_validate"]["folds"] = 2
        self.toy.write(folder)
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        self.dvc("init", "-q")
        self.dvc("config", "core.analytics", "false")

    def dvc(self, *words: str, **env: str) -> str:
        command = [sys.executable, "-m", "dvc", *words]
        done = subprocess.run(command, cwd=self.folder, env=environment(**env), capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"dvc {' '.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout + done.stderr

    def ran(self, *words: str, **env: str) -> list[str]:
        """Stages that a `dvc repro` ran, in order."""
        out = self.dvc("repro", *words, **env)
        return [line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage '")]

    def touch(self, file: str) -> None:
        path = self.folder / file
        path.write_text(path.read_text(encoding="utf-8") + "\n# touched\n", encoding="utf-8")

    def results(self) -> dict[str, str]:
        """Path of every out → its hash, as DVC has locked them."""
        stages = yaml.safe_load((self.folder / "dvc.lock").read_text(encoding="utf-8"))["stages"]
        return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}
