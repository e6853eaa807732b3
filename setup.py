"""How the repository becomes a wheel: pipeline/ and stages/ lie under `tag2mask`, so that no names of packages clash.

In a clone, `pipeline` and `stages` are imported as they lie there. In a wheel, they are `tag2mask.pipeline` and
`tag2mask.stages`: the build changes the names in import statements and nothing else, so lines and files stay the same. The
files that `tag2mask init` copies (dvc.yaml, presets/, recipes/) come with them.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
IMPORT = re.compile(r"^(\s*)(from|import) (pipeline|stages)\b", re.MULTILINE)
DATA = ["dvc.yaml", "presets", "recipes", "data/weights/scratch.txt"]
PACKAGES = find_packages(include=["pipeline*", "stages*"])
EDITABLE = "editable_wheel" in sys.argv  # `pip install --editable`, as `make setup` does: the clone itself is imported


def with_prefix(source: str) -> str:
    """A module's text with `pipeline` and `stages` imported from `tag2mask`. ValueError for a plain `import`."""
    bare = re.search(r"^\s*import (pipeline|stages)\b.*$", source, re.MULTILINE)
    if bare:
        raise ValueError(f"{bare.group().strip()!r}: write `from … import …`, which a wheel can map to tag2mask")
    return IMPORT.sub(r"\1\2 tag2mask.\3", source)


class Build(build_py):
    """Copies the packages, maps their imports, and adds the data files."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "tag2mask"
        for module in target.rglob("*.py"):
            module.write_text(with_prefix(module.read_text(encoding="utf-8")), encoding="utf-8")
        (target / "__init__.py").touch()
        for name in DATA:
            source = ROOT / name
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target / name, dirs_exist_ok=True)
            else:
                shutil.copy(source, target / name)


def layout() -> dict[str, Any]:
    """Arguments of setup that differ between a clone and a wheel."""
    web = ["web/*"]
    if EDITABLE:
        return {
            "packages": PACKAGES,
            "package_data": {"pipeline.report": web},
            "entry_points": {"console_scripts": ["tag2mask = stages.tag2mask:main"]},
        }
    return {
        "packages": [f"tag2mask.{name}" for name in PACKAGES],
        "package_dir": {"tag2mask.pipeline": "pipeline", "tag2mask.stages": "stages"},
        "package_data": {"tag2mask.pipeline.report": web},
        "entry_points": {"console_scripts": ["tag2mask = tag2mask.stages.tag2mask:main"]},
    }


setup(cmdclass={"build_py": Build}, **layout())
