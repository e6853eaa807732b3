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
from pipeline.audit.summary import headline
from pipeline.core import sections
from pipeline.report import history
from stages.report import main
from tests.toys import PROJECT

NAME = "<b>cat</b>"


def figures(miou: float, iou: float) -> dict[str, Any]:
    return metrics_file.HEADER | {
        "data": {"records": "r", "ids": "i", "classes": "c"},
        "images": {"train": 3, "val": 0},
        "threshold": {},
        "stages": {
            "pseudo_masks": {
                "split": "train",
                "miou": miou,
                "coverage": 0.2,
                "with_reasons": 0.1,
                "classes": {NAME: {"iou": iou}, "dog": {"iou": 0.5}},
            }
        },
    }


def put(root: Path, values: dict[str, Any], images: dict[str, tuple[object, object]]) -> None:
    for name in ("metrics", "audit"):
        (root / name).mkdir(exist_ok=True)
    (root / "audit" / "cam.json").write_text(json.dumps(values), encoding="utf-8")
    (root / "metrics" / "cam.json").write_text(json.dumps(headline(values)), encoding="utf-8")
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


def commit(message: str = "old") -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", message], check=True)


def against_a_revision_with(project: Path, files: dict[str, Any]) -> str:
    """The page against a revision that has these files of figures; None: it lacks the file. Then all is as before."""
    now = {name: (project / name).read_text(encoding="utf-8") for name in files}
    for name, values in files.items():
        (project / name).unlink()
        if values is not None:
            (project / name).write_text(json.dumps(values), encoding="utf-8")
    commit()
    for name, text in now.items():
        (project / name).write_text(text, encoding="utf-8")
    done = run("--against", "HEAD")
    assert done.exit_code == 0, done.output
    return done.output + (project / "against.html").read_text(encoding="utf-8")


def test_figures_of_older_versions_at_the_old_place_are_compared_and_said_to_be_such(project: Path) -> None:
    old = {"schema": "metrics", "version": 2, "stages": figures(0.5, 0.4)["stages"]}
    text = against_a_revision_with(project, {"audit/cam.json": None, "metrics/cam.json": old})
    assert "Metrics/cam.json of the revision has schema metrics version 2, expected is schema figures version 3" in text
    assert '0.600 <span class="better">▲ 0.100' in text and '0.300 <span class="worse">▼ 0.100' in text
    text = against_a_revision_with(project, {"audit/cam.json": None, "metrics/cam.json": {"stages": old["stages"]}})
    assert "of the revision has no version" in text and '0.600 <span class="better">▲ 0.100' in text


def test_a_revision_with_a_headline_alone_is_compared_by_its_miou(project: Path) -> None:
    files = {"audit/cam.json": None, "metrics/cam.json": headline(figures(0.5, 0.4))}
    text = against_a_revision_with(project, files)
    assert "only the mIoU of its stages is compared" in text and '0.600 <span class="better">▲ 0.100' in text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": {"records": "x", "ids": "i", "classes": "c"}}, "tags, splits, sizes or contents of images differ"),
        ({"data": {"records": "x", "ids": "x", "classes": "c"}, "images": {"train": 9, "val": 1}},
         "images differ; images: 9 train and 1 val in the revision, 3 train and 0 val now"),
        ({"data": {"records": "x", "ids": "i", "classes": "x"},
          "stages": {"pseudo_masks": {"classes": {"<i>cow": {"iou": 0.5}, "dog": {"iou": 0.5}}}}},
         "classes differ (in the revision alone: <i>cow; new: <b>cat</b>)"),
    ],
)  # fmt: skip
def test_figures_of_other_data_are_said_not_to_be_comparable(project: Path, changed: dict[str, Any], words: str) -> None:
    text = against_a_revision_with(project, {"audit/cam.json": figures(0.5, 0.4) | changed})
    assert f"cam: not comparable with HEAD: {words}" in text
    page = text.partition("<!doctype")[2]
    assert "The two are of different data" in page and "<i>cow" not in page


def test_the_address_of_the_page_is_printed(project: Path) -> None:
    assert f"report: {(project / 'against.html').as_uri()}" in run("--against", "HEAD").output
    assert "not comparable" not in run("--against", "HEAD").output


def test_figures_of_now_without_a_version_are_refused(project: Path) -> None:
    (project / "audit" / "cam.json").write_text(json.dumps({"stages": {}}), encoding="utf-8")
    done = run("--against", "HEAD")
    assert done.exit_code == 1 and "expected is schema figures version 3; run `dvc repro evaluate`" in done.output


def test_the_history_has_the_figures_of_each_commit_that_changed_them(project: Path) -> None:
    old = {"version": 2, "stages": {"pseudo_masks": {"miou": 0.7, "coverage": 0.2}}}
    against_a_revision_with(project, {"metrics/cam.json": old})
    points = history.points_of(Path("metrics/cam.json"))
    assert [point["miou"] for point in points] == [{"pseudo_masks": miou} for miou in (0.6, 0.7, 0.5)]
    assert [point["subject"] for point in points] == ["", "old", "first"] and points[0]["commit"] == ""
    assert history.points_of(Path("metrics/nobody.json")) == []
    history.write(project / "provenance" / "history.js", Path("metrics"), ["nobody", "cam"])
    text = (project / "provenance" / "history.js").read_text(encoding="utf-8")
    assert text.startswith('tag2mask.history({"nobody":[],"cam":[{')


def test_a_revision_that_is_none_or_knows_no_method_is_refused(project: Path) -> None:
    done = run("--against", "nosuch")
    assert done.exit_code == 1 and "--against nosuch" in done.output and "git revision" in done.output
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    (project / "params.yaml").write_text(yaml.safe_dump({**params, "methods": {"new": {}}}), encoding="utf-8")
    (project / "audit" / "new.json").write_text(json.dumps(figures(0.1, 0.1)), encoding="utf-8")
    done = run("--against", "HEAD")
    assert done.exit_code == 1 and "no metrics of new" in done.output


def test_a_report_without_any_run_says_so(project: Path) -> None:
    (project / "audit" / "cam.json").unlink()
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    values = {**params, "report": {"title": "t", "palette": "voc", "review": 1}}
    (project / "params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    done = run()  # paths that are not given are those of dvc.yaml
    assert done.exit_code == 1 and "no run to report. cam: not evaluated yet. Run `dvc repro`" in done.output
