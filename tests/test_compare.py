"""`report --against REV`: figures of another revision, from git and from DVC's cache."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from pipeline import metrics_file
from pipeline.core import sections
from stages.report import main
from tests.toys import PROJECT

NAME = "<b>cat</b>"


def figures(miou: float, iou: float) -> dict[str, Any]:
    return metrics_file.HEADER | {
        "stages": {"pseudo_masks": {"split": "train", "miou": miou, "classes": {NAME: {"iou": iou}, "dog": {"iou": 0.5}}}}
    }


def put(root: Path, values: dict[str, Any], images: dict[str, tuple[object, object]]) -> None:
    for name in ("metrics", "audit"):
        (root / name).mkdir(exist_ok=True)
    (root / "metrics" / "cam.json").write_text(json.dumps(values), encoding="utf-8")
    with (root / "audit" / "cam.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "split", "stage", "tags", "truth", "miou", "score", "reasons"])
        rows.writerows([i, "train", "pseudo_masks", "", 1, miou, score, ""] for i, (miou, score) in images.items())


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two revisions: the first is committed, the second lies in the work tree."""
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    params = dict.fromkeys(sections.TOP_LEVEL, 0)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**params, "methods": {"cam": {}}}), encoding="utf-8")
    stage = yaml.safe_load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["report"]
    (tmp_path / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"report": stage}}), encoding="utf-8")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    put(
        tmp_path,
        figures(0.5, 0.4),
        {"<i>x</i>": (0.9, ""), "/y ?": (0.2, ""), "same": (0.3, ""), "gone": (0.1, ""), "scored": ("", 0.2)},
    )
    with Repo.init() as repo:
        repo.config["core"]["analytics"] = False
        repo.add("audit/cam.csv")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "first"], check=True)
    put(
        tmp_path,
        figures(0.6, 0.3),
        {"<i>x</i>": (0.4, ""), "/y ?": (0.8, ""), "same": (0.3, ""), "new": (0.1, ""), "scored": ("", 0.9)},
    )
    return tmp_path


def test_stages_classes_and_images_that_gained_and_lost_are_told(project: Path) -> None:
    done = run("--against", "HEAD")
    assert done.exit_code == 0, done.output
    text = (project / "against.html").read_text(encoding="utf-8")
    assert '0.600 <span class="better">▲ 0.100' in text and '0.300 <span class="worse">▼ 0.100' in text
    assert "2 gained" in text and "1 lost" in text and "1 unchanged" in text
    assert "1 that are in the revision alone, 1 that are new" in text
    lost, gained = text.index("Largest losses"), text.index("Largest gains")
    assert lost < text.index("&lt;i&gt;x&lt;/i&gt;") < gained < text.index("/y ?") and gained < text.index("scored")
    assert 'href="report/index.html#cam/pseudo_masks/%2Fy%20%3F"' in text
    assert "<b>cat" not in text and "&lt;b&gt;cat" in text and "<i>x" not in text


def test_metrics_of_a_revision_without_a_version_are_compared_and_said_to_be_such(project: Path) -> None:
    assert run("--against", "HEAD").exit_code == 0
    assert "version" not in (project / "against.html").read_text(encoding="utf-8")
    now = (project / "metrics" / "cam.json").read_text(encoding="utf-8")
    (project / "metrics" / "cam.json").write_text(json.dumps({"stages": figures(0.5, 0.4)["stages"]}), encoding="utf-8")
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "old"], check=True)
    (project / "metrics" / "cam.json").write_text(now, encoding="utf-8")
    assert run("--against", "HEAD").exit_code == 0
    text = (project / "against.html").read_text(encoding="utf-8")
    assert "metrics/cam.json of the revision has no version, expected is schema metrics version 2" in text
    assert '0.600 <span class="better">▲ 0.100' in text


def test_metrics_of_now_without_a_version_are_refused(project: Path) -> None:
    (project / "metrics" / "cam.json").write_text(json.dumps({"stages": {}}), encoding="utf-8")
    done = run("--against", "HEAD")
    assert done.exit_code == 1 and "expected is schema metrics version 2; run `dvc repro evaluate`" in done.output


def test_a_revision_that_is_none_or_knows_no_method_is_refused(project: Path) -> None:
    done = run("--against", "nosuch")
    assert done.exit_code == 1 and "--against nosuch" in done.output and "git revision" in done.output
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    (project / "params.yaml").write_text(yaml.safe_dump({**params, "methods": {"new": {}}}), encoding="utf-8")
    (project / "metrics" / "new.json").write_text(json.dumps(figures(0.1, 0.1)), encoding="utf-8")
    done = run("--against", "HEAD")
    assert done.exit_code == 1 and "no metrics of new" in done.output


def test_a_report_without_its_paths_is_refused_with_their_names(project: Path) -> None:
    done = run("--metrics", "metrics")
    assert done.exit_code == 2 and "--records, --plots, --gallery, --inspection, --audit, --report" in done.output
