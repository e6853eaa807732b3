"""The gallery's pictures, the rows of images and review.csv: what is selected and packed, and what a spreadsheet sees."""

from __future__ import annotations

import csv
import io
import json
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import metrics, runtime, stage_order
from pipeline.audit import gallery
from pipeline.audit.tally import audit_of
from pipeline.core import store
from pipeline.core.labels import LabelSpace
from pipeline.core.records import ImageRecord, Records
from pipeline.core.sections import Report
from pipeline.imaging import planes
from pipeline.report import audits, charts, colours, image_table, page, rows, run_metrics
from pipeline.report.scripts import as_script
from tests import page_case
from tests.test_evaluate import LABELS, build, tallied


def records_of(train: int, val: int) -> Records:
    names = [(f"t{at:03d}", "train") for at in range(train)] + [(f"v{at:03d}", "val") for at in range(val)]
    return Records(LabelSpace(("a",)), tuple(ImageRecord(i, "", (1, 1), split, (), b"") for i, split in names), ())


@given(st.integers(0, 30), st.integers(0, 12), st.integers(0, 50))
def test_no_more_are_selected_than_asked_for_in_order_of_ids_and_of_both_splits(train: int, val: int, count: int) -> None:
    selected = gallery.selection(np.full(train + val, np.nan), records_of(train, val), count)
    ids = [record.id for record, _ in selected]
    assert ids == sorted(set(ids)) and len(ids) <= count and all(kind in (1, 2, 3) for _, kind in selected)
    if count >= train + val:
        assert len(ids) == train + val


def test_the_worst_are_selected_and_the_random_ones_are_the_same_for_every_run() -> None:
    read = records_of(40, 10)
    up = np.arange(50) / 50
    down = 1 - up

    def ids(quality: np.ndarray, bit: int) -> set[str]:
        return {record.id for record, kind in gallery.selection(quality, read, 20) if kind & bit}

    assert ids(up, gallery.RANDOM) == ids(down, gallery.RANDOM) and len(ids(up, gallery.RANDOM)) == 10
    assert ids(up, gallery.WORST) >= {f"t{at:03d}" for at in range(8)} | {"v000", "v001"}
    assert len(gallery.selection(up, read, 20)) == 20


def test_pictures_hold_what_the_stores_hold(tmp_path: Path) -> None:
    inputs, read = build(tmp_path, decoder=True)
    audit = audit_of(tallied(inputs, read))
    items = dict(gallery.items(gallery.gallery_images(audit, read, 8), inputs))
    quality = dict(zip(read.ids, audit.quality, strict=True))
    masks, truth = store.Store(inputs.pseudo_masks, store.PSEUDO_MASKS), store.Store(inputs.truth, store.TRUTH)
    for record in read:
        item = items[record.id]
        rows_, columns = item["size"]
        assert (rows_, columns) == (32, 32)
        assert Image.open(io.BytesIO(item["photograph"].tobytes())).size == (32, 32)
        assert Image.open(io.BytesIO(item["scores"].tobytes())).size == (16, 16)
        confidence = np.asarray(Image.open(io.BytesIO(item["confidence"].tobytes())))
        assert confidence.shape == (16, 16) and abs(confidence.astype(int) - 200).max() <= 2
        names = [name for name, there in zip(stage_order.GALLERY, item["present"], strict=True) if there]
        maps = np.frombuffer(zlib.decompress(item["maps"].tobytes()), np.uint8).reshape(len(names), 32, 32)
        last = names.index("predictions" if record.split == "val" else "pseudo_masks")
        assert item["miou"][stage_order.GALLERY.index(names[last])] == pytest.approx(quality[record.id], abs=1e-6)
        if record.split == "train":
            full = masks.read(record.id, "mask")
            assert set(np.unique(maps[last])) <= set(np.unique(full))
            np.testing.assert_array_equal(maps[last], full[1::2, 1::2])
        true = truth.read(record.id, "mask")
        packed = np.frombuffer(zlib.decompress(item["truth"].tobytes()), np.uint8).reshape(32, 32)
        np.testing.assert_array_equal(packed, true[1::2, 1::2])
        assert metrics.miou(metrics.confusion(true, true, len(LABELS) + 1), protocol="background") == 1


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(32, 512))
def test_thumbnails_keep_within_their_side_and_are_never_empty_or_enlarged(height: int, width: int, side: int) -> None:
    rows_, columns = planes.fitted((height, width), side)
    assert 1 <= rows_ <= min(height, side) and 1 <= columns <= min(width, side)
    assert max(rows_, columns) == min(side, max(height, width))


def audit_file(
    path: Path, lines: list[list[str]], header: tuple[str, ...] = ("id", "split", "stage", "miou", "score", "reasons")
) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    return path


def test_the_worst_rows_go_by_score_then_by_miou_and_of_final_masks_only(tmp_path: Path) -> None:
    path = audit_file(
        tmp_path / "m.csv",
        [["a", "train", "pseudo_masks", "0.1", "0.9", ""], ["b", "train", "pseudo_masks", "0.9", "0.2", "leak|edges"],
         ["c", "train", "pseudo_masks", "0.5", "", ""], ["d", "train", "refined", "0", "0", ""], ["e", "val",
         "predictions", "", "", ""],
         ["f", "val", "predictions", "", "nan", ""]],
    )  # fmt: skip

    def worst(count: int) -> list[rows.Row]:
        kept = rows.Worst(count)
        for row in rows.read(path):
            kept.add(row)
        return kept.rows()

    assert [row.id for row in worst(10)] == ["b", "c", "a"] and worst(10)[0].reasons == ("leak", "edges")
    assert [row.id for row in worst(1)] == ["b"]


def test_a_damaged_table_of_rows_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv lacks the columns score, reasons"):
        list(rows.read(audit_file(tmp_path / "a.csv", [], ("id", "stage", "miou"))))
    with pytest.raises(ValueError, match=r"b\.csv, line 2: could not convert"):
        list(rows.read(audit_file(tmp_path / "b.csv", [["a", "train", "refined", "high", "", ""]])))
    with pytest.raises(FileNotFoundError, match="dvc repro evaluate"):
        list(rows.read(tmp_path / "none.csv"))


@given(st.text(max_size=12))
def test_no_cell_of_the_review_starts_a_formula_and_its_text_can_be_had_back(text: str) -> None:
    cell = rows.safe_cell(text)
    assert not cell.lstrip(" ").startswith(("=", "+", "-", "@", "\t", "\r"))
    assert (cell[1:] if cell.startswith("'") else cell) == text


def test_the_review_names_image_method_stage_score_and_reasons(tmp_path: Path) -> None:
    page_case.write(tmp_path, ["=cmd|' /C calc'!A0", 'a, "b"', "c"], labels=LabelSpace(("x",)))
    with (tmp_path / "report" / "review.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["id", "method", "stage", "score", "method_agreement", "reasons"] and len(found) == 6
    assert {row["id"] for row in found} == {"'=cmd|' /C calc'!A0", 'a, "b"', "c"}
    assert [row["score"] for row in found[:3]] == sorted(row["score"] for row in found[:3])


@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_values_inside_a_script_come_back_and_never_end_it(value: object) -> None:
    text = as_script(value)
    assert not set(text) & set("<>&\u2028\u2029") and json.loads(text) == value


def test_the_same_inputs_give_the_same_bytes_and_no_old_pictures_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = LabelSpace(("x", "y"))
    monkeypatch.setattr(page, "INLINE_BYTES", 0)
    first = page_case.write(tmp_path, [f"i{at}" for at in range(60)], labels=labels)

    def written() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in first.parent.rglob("*") if path.is_file()}

    before = written()
    assert {
        "data-0000.js",
        "data-0001.js",
        "index.html",
        "review.csv",
        "0-train-quality-0000.js",
        "1-val-id-0000.js",
    } <= set(before)
    page_case.write(tmp_path, [f"i{at}" for at in range(60)], labels=labels)
    assert before == written()
    monkeypatch.setattr(page, "INLINE_BYTES", 10**9)
    page_case.write(tmp_path, [f"i{at}" for at in range(60)], labels=labels)
    assert {path.name for path in first.parent.iterdir()} == {"index.html", "review.csv"}


def test_a_report_of_hard_links_into_a_cache_is_replaced_and_the_cache_stays(tmp_path: Path) -> None:
    path = page_case.write(tmp_path, ["a", "b"], labels=LABELS)
    cached = tmp_path / "cached"
    cached.hardlink_to(path)
    before = cached.read_bytes()
    page_case.write(tmp_path, ["a", "b", "c"], labels=LABELS)
    assert path.read_bytes() != before and cached.read_bytes() == before


def test_runs_that_cannot_be_shown_are_named_with_the_reason_and_the_others_shown(tmp_path: Path) -> None:
    page_case.write(tmp_path, ["a", "b"], labels=LABELS, methods=("cam", "weaktr", "afa", "apc", "ppl"))
    inputs, settings = page_case.inputs_of(tmp_path), Report("t", "voc", 1)
    figures = json.loads((tmp_path / "audit" / "afa.json").read_text(encoding="utf-8"))
    of_others = figures | {"data": figures["data"] | {"records": "others"}}
    (tmp_path / "audit" / "afa.json").write_text(json.dumps(of_others), encoding="utf-8")
    (tmp_path / "audit" / "apc.json").write_text(json.dumps(figures | {"version": 1}), encoding="utf-8")
    (tmp_path / "gallery" / "ppl.h5").unlink()
    methods = ("cam", "semples", "weaktr", "afa", "apc", "ppl")
    text = page.write(tmp_path / "report", inputs, methods, settings, {"cam"}).read_text(encoding="utf-8")
    assert "<strong>semples</strong> is not on this page: not evaluated yet" in text
    assert "<strong>afa</strong> is not on this page: evaluated on other data" in text
    assert "apc.json has schema figures version 1, expected is schema figures version 3." in text
    assert "gallery/ppl.h5 is missing" in text and "<strong>cam</strong> is out of date" in text
    assert json.loads(text.partition('id="report-data">')[2].partition("<")[0])["methods"] == ["cam", "weaktr"]
    with pytest.raises(FileNotFoundError, match=r"no run to report\. semples: not evaluated yet"):
        page.write(tmp_path / "report", inputs, ["semples"], settings)


def test_pages_of_rows_hold_all_images_in_every_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_table, "PER_PAGE", 2)
    table = image_table.ImageTable(["cat", "a|b"])
    given = [("a", 0.5, ("leak",)), ("b<", 0.1, ()), ("c", None, ("leak", "edges")), ("d", 0.1, ("leak",)), ("e", 0.9, ())]
    for image_id, score, reasons in given:
        table.add(rows.Row(image_id, "predictions", None, score, reasons, tags=("a%7Cb",)))
    written = table.write(tmp_path, "0")

    def ids(name: str) -> list[str]:
        texts = [path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob(f"0-{name}-*.js"))]
        assert all("<" not in text for text in texts)
        pages = [json.loads(text.partition(",")[2].rstrip().removesuffix(");")) for text in texts]
        assert all(len(rows_) <= 2 for rows_ in pages)
        return [row[0] for rows_ in pages for row in rows_]

    assert ids("id") == ["a", "b<", "c", "d", "e"] and ids("quality") == ["b<", "d", "a", "e", "c"]
    assert ids("reason-0") == ["d", "a", "c"] and ids("reason-1") == ["c"]
    assert written == {"rows": 5, "per_page": 2, "reasons": [["leak", 3], ["edges", 1]], "first_ids": ["a", "c", "e"]}
    with pytest.raises(ValueError, match="'x' has the tag 'dog', which is no class"):
        image_table.ImageTable(["cat"]).add(rows.Row("x", "predictions", None, 0.5, (), tags=("dog",)))


def test_a_table_of_rows_that_is_not_sorted_by_id_is_refused(tmp_path: Path) -> None:
    audit_file(tmp_path / "cam.csv", [["b", "train", "refined", "", "", ""], ["a", "train", "refined", "", "", ""]])
    with pytest.raises(ValueError, match=r"cam\.csv: 'a' comes after 'b'"):
        list(audits.images(tmp_path, ["cam"]))


@pytest.mark.parametrize("name", ["voc", "safe"])
def test_the_first_twenty_classes_have_colours_of_their_own(name: str) -> None:
    found = colours.of_classes(20, name)
    assert len(set(found)) == 21 and found[0] == "#000000" and all(len(text) == 7 for text in found)
    assert len(colours.of_classes(80, name)) == 81


def test_steps_that_follow_one_another_are_one_flow() -> None:
    steps = [
        ("score_maps", "decoder"),
        ("score_maps", "refined"),
        ("refined", "pseudo_masks"),
        ("score_maps_val", "predictions"),
    ]
    found = run_metrics.flow_chains({"flow": [{"from": a, "to": b, "corrected": 0.1, "broken": 0.05} for a, b in steps]})
    assert [[step["to"] for step in chain] for chain in found] == [["decoder"], ["refined", "pseudo_masks"], ["predictions"]]
    assert found[0][0]["all"] == {"corrected": 0.1, "broken": 0.05}


def test_drawings_are_well_formed_and_say_their_figures() -> None:
    step = {"from": "score_maps", "to": "refined", "all": {"corrected": 0.03, "broken": 0.01}}
    drawn = [
        charts.flow([step], {"score_maps": 0.8, "refined": 0.82}),
        charts.threshold_curve(
            [(0.0, 0.2), (0.5, 0.6)], {"chosen": 0.4, "miou_at_chosen": 0.5, "oracle": 0.5, "miou_at_oracle": 0.6}
        ),
        charts.reliability([[0.5, 0.4, 1.0], [None, None, 0.0]]),
        charts.interval(0.5, 0.4, 0.6),
        charts.sparkline([0.5, None, 0.7]),
    ]
    labels = [ElementTree.fromstring(text).attrib["aria-label"] for text in drawn]
    assert "3.00 % of pixels corrected" in labels[0] and "oracle: 0.500, mIoU 0.600" in labels[1] and "0.400" in labels[3]
    assert charts.sparkline([None]) == "" and charts.threshold_curve([], {}) == ""
    assert charts.flow([{**step, "from": "<x>"}], {"refined": 1.0}).count("<x>") == 0


def test_the_digest_of_params_changes_with_a_stages_own_params_only(tmp_path: Path) -> None:
    train = {"foreach": "${methods}", "do": {"params": [{"${item.recipe}": ["train"]}], "deps": []}}
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": {"train": train}}), encoding="utf-8")

    def digest(seed: int, other: int) -> str:
        (tmp_path / "params.yaml").write_text(json.dumps({"methods": {"cam": {"recipe": "r.yaml"}}, "report": other}))
        (tmp_path / "r.yaml").write_text(json.dumps({"train": {"seed": seed}, "refine": other}))
        return runtime.params_digest("train@cam", tmp_path)

    assert digest(1, 1) == digest(1, 2) != digest(2, 1)


def test_a_fully_supervised_upper_bound_that_was_measured_is_shown_with_how_much_of_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "metrics" / "upper_bound").mkdir(parents=True)
    (tmp_path / "metrics" / "upper_bound" / "cam.json").write_text('{"miou": 0.9, "images": 7}', encoding="utf-8")
    page = page_case.write(tmp_path, ["a", "b", "c", "d", "e"], labels=LABELS, methods=("cam", "weaktr"))
    assert page.read_text(encoding="utf-8").count("% of the upper bound<br>0.900") == 1
