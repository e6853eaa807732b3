"""docs/sharing.md as it is written: a project goes to a colleague, who gets photographs, weights and results, and re-runs
nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.project_copy import environment
from tests.toys import PROJECT, Toy, toy_folder

COMMAND = "#!{python}\nimport sys\nsys.path.insert(0, {project!r})\nfrom stages.tag2mask import main\nmain()\n"


def blocks(heading: str) -> str:
    """The commands below a heading of the page."""
    page = (PROJECT / "docs" / "sharing.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return "\n".join(line.strip() for line in re.findall(r"^    .*", section, re.MULTILINE))


@pytest.fixture
def bash(tmp_path: Path) -> Callable[[str, Path], str]:
    """Runs lines of the page, with remotes and clones under tmp_path, and stops after stage prepare."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "tag2mask"
    script.write_text(COMMAND.format(python=sys.executable, project=str(PROJECT)), encoding="utf-8")
    script.chmod(0o755)
    env = environment(TAG2MASK_WORKERS="1", TAG2MASK_RANKS="1", GIT_AUTHOR_NAME="a", GIT_AUTHOR_EMAIL="a@b.example")
    env |= {"GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b.example", "PATH": f"{folder}:{env['PATH']}"}

    def run(lines: str, where: Path) -> str:
        lines = lines.replace("/mnt/team/tag2mask", str(tmp_path / "remote"))
        lines = lines.replace("git@host:team/mine.git", str(tmp_path / "mine"))
        lines = lines.replace("tag2mask run", "tag2mask run --until prepare")
        lines = lines.replace("dvc pull", "dvc pull --allow-missing")  # the other stages have not run
        command = ["bash", "-euc", lines]
        done = subprocess.run(command, cwd=where, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{lines}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run


def test_a_colleague_gets_photographs_weights_and_results_and_reruns_nothing(
    bash: Callable[[str, Path], str], tmp_path: Path
) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "desk" / "mine"
    toy_folder(mine / "raw", train=6, val=2)
    bash("tag2mask init mine --images mine/raw --method cam", tmp_path)
    toy = Toy(tmp_path / "set")
    (mine / "recipes" / "cam.yaml").write_text(yaml.safe_dump(toy.recipes["cam"]), encoding="utf-8")
    params = mine / "params.yaml"
    params.write_text(params.read_text("utf-8").replace("deit_tiny_patch16_224", "mine"), encoding="utf-8")
    (mine / "data" / "weights" / "mine.safetensors").write_bytes(b"weights")
    assert "prepare …" in bash("tag2mask run", mine)
    bash("dvc add raw\n" + blocks("Once: what DVC has to know"), mine)

    theirs.parent.mkdir()
    assert "prepare …" not in bash(blocks("A colleague"), theirs.parent)
    assert (theirs / "data" / "weights" / "mine.safetensors").read_bytes() == b"weights"
    assert (theirs / "data" / "records.h5").read_bytes() == (mine / "data" / "records.h5").read_bytes()
    assert len(list((theirs / "raw" / "images").iterdir())) == 8

    (tmp_path / "elsewhere").symlink_to(theirs / "raw")
    edited = theirs / "params.yaml"
    edited.write_text(edited.read_text("utf-8").replace("root: raw", f"root: {tmp_path / 'elsewhere'}"), encoding="utf-8")
    assert "prepare …" in bash("tag2mask run", theirs)
    assert (theirs / "data" / "records.h5").read_bytes() == (mine / "data" / "records.h5").read_bytes()
