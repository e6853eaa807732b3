"""A project folder: one data set with its dvc.yaml, params.yaml, recipes and results; the code is the installation's.

dvc.yaml of such a folder is made from that of this package: what was a dep on code becomes an entry of code.yaml, and stage
`code`, which always runs, renews that file. So DVC re-runs what a changed file of the package can change, as in a clone.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline import code_files
from pipeline.code_files import CODE_FILE
from pipeline.core.config import PARAMS_FILE

DAG_FILE = "dvc.yaml"
HEADER = (
    "# Kept by tag2mask; `tag2mask run` renews it after an update. Stages of your own go into a dvc.yaml of a sub-folder.\n"
    "# sha256 of what follows: {digest}\n"
)
KEPT = re.compile(r"\A# Kept by tag2mask;.*\n# sha256 of what follows: ([0-9a-f]{64})\n")
CODE_STAGE = {
    "cmd": f"tag2mask stage code --code {CODE_FILE}",
    "always_changed": True,
    "outs": [{CODE_FILE: {"cache": False}}],
}


class ProjectError(ValueError):
    """A project folder is not as tag2mask left it; the text says what to do."""


def dag() -> str:
    """Text of a project folder's dvc.yaml."""
    stages: dict[str, Any] = {"code": CODE_STAGE}
    for name, entry in _packaged()["stages"].items():
        stages[name] = {**entry, "do": _without_code(entry["do"])} if "do" in entry else _without_code(entry)
    body = yaml.safe_dump({"stages": stages}, sort_keys=False, width=125)
    return HEADER.format(digest=hashlib.sha256(body.encode()).hexdigest()) + body


def code() -> str:
    """Text of code.yaml: digests of all code that a stage can depend on."""
    entries = [entry.get("do", entry) for entry in _packaged()["stages"].values()]
    paths = {dep for entry in entries for dep in entry["deps"] if code_files.is_code(dep)}
    text = yaml.safe_dump(code_files.digests(paths), width=125)
    return (
        "# Digests of the installed tag2mask's code: DVC re-runs what depends on one that changes. Kept by stage code.\n"
        + text
    )


def is_project(folder: Path) -> bool:
    """Whether dvc.yaml of the folder is one that tag2mask keeps. In a clone it is not."""
    path = folder / DAG_FILE
    return path.is_file() and KEPT.match(path.read_text(encoding="utf-8")) is not None


def renew(folder: Path) -> bool:
    """Makes dvc.yaml that of the installed tag2mask; whether it was another. Does nothing in a clone.

    ProjectError where dvc.yaml was edited by hand, whose changes would be lost.
    """
    if not is_project(folder):
        return False
    path, now = folder / DAG_FILE, dag()
    before = path.read_text(encoding="utf-8")
    if before == now:
        return False
    kept = KEPT.match(before)
    if kept is None or kept[1] != hashlib.sha256(before[kept.end() :].encode()).hexdigest():
        raise ProjectError(
            f"{path} was edited, and the installed tag2mask needs another: move stages of your own into a dvc.yaml of a "
            "sub-folder, delete this file's first two lines to keep it as it is, or delete the file and write it anew by "
            "`tag2mask init . --renew`"
        )
    path.write_text(now, encoding="utf-8")
    return True


def write_dag(folder: Path) -> None:
    """Writes dvc.yaml anew. ProjectError where the folder is no project of params.yaml, or is a clone of tag2mask."""
    if not (folder / PARAMS_FILE).is_file() or (folder / "pipeline").is_dir():
        raise ProjectError(f"{folder} is no project folder: it holds no {PARAMS_FILE}, or is a clone of tag2mask")
    (folder / DAG_FILE).write_text(dag(), encoding="utf-8")


def write_code(path: Path) -> None:
    """Stage code. ProjectError where dvc.yaml is of another version of tag2mask: it may lack stages and deps."""
    if is_project(Path()) and (Path() / DAG_FILE).read_text(encoding="utf-8") != dag():
        raise ProjectError(f"{DAG_FILE} does not go with the installed tag2mask: `tag2mask run` renews it, and goes on")
    path.write_text(code(), encoding="utf-8")


def _packaged() -> dict[str, Any]:
    return yaml.safe_load((code_files.ROOT / DAG_FILE).read_text(encoding="utf-8"))


def _without_code(entry: dict[str, Any]) -> dict[str, Any]:
    """A stage that depends on entries of code.yaml instead of files, and is started by the console command."""
    by_path = [dep for dep in entry["deps"] if code_files.is_code(dep)]
    entries = {CODE_FILE: [code_files.entry_of(dep) for dep in by_path]}
    return {
        **entry,
        "cmd": entry["cmd"].replace("python -m stages.", "tag2mask stage "),
        "params": [*entry.get("params", []), entries],
        "deps": [dep for dep in entry["deps"] if dep not in by_path],
    }
