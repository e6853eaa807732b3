"""The report in headless Chromium: controls, keys, deep links, hostile names, a thousand images, no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pipeline.core.labels import LabelSpace
from pipeline.core.sections import Report
from pipeline.engine import provenance
from pipeline.report import gallery as blocks
from pipeline.report import image_table, page
from pipeline.report.scripts import as_script
from tests import page_case

CHROMIUM = shutil.which("chromium")
LABELS = LabelSpace(("cat", "dog", "sheep"))
HOSTILE = LabelSpace(("<script>alert(1)</script>", 'größe "x"', "'; alert(2) //", "</title><img src=x onerror=alert(3)>"))
HOSTILE_IDS = (
    "<script>alert(4)</script>", "../../etc/passwd", 'a "quoted" \' id', "ü ñ 漢字/🐄", "=1+1", "100% #hash?x=1",
    "</script><b>bold</b>", "<!--", "--> <!-- pictures -->", "\u2028line",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: make setup")
    with api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """A page with what it complained of and what it asked for."""

    def __init__(self, browser: Any, path: Path, address: str = "", width: int = 1200) -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800})
        self.page.set_default_timeout(15_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("alert"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri() + address)
        self.page.wait_for_selector(".card img[src]")

    def ids(self) -> list[str]:
        return self.page.locator(".card .id").all_text_contents()

    def pressed(self) -> str:
        return self.page.locator('#layers [aria-pressed="true"]').get_attribute("data-layer")

    def painted(self, where: str) -> list[int]:
        """Counts of clear, half-clear and solid pixels of a canvas, once it has been drawn."""
        self.page.wait_for_function(
            """(where) => {
              window.pixels = (from) => {
                const copy = new OffscreenCanvas(from.width, from.height).getContext("2d", { willReadFrequently: true });
                copy.drawImage(from, 0, 0);
                return copy.getImageData(0, 0, from.width, from.height).data;
              };
              const found = document.querySelector(where);
              return found && window.pixels(found).some((value) => value);
            }""",
            arg=where,
        )
        code = (
            "(c) => { const d = window.pixels(c); const n = [0, 0, 0];"
            "for (let i = 3; i < d.length; i += 4) n[d[i] === 0 ? 0 : d[i] < 255 ? 1 : 2] += 1; return n }"
        )
        return self.page.locator(where).first.evaluate(code)

    def leave_viewer(self) -> None:
        """By Escape. The browser tells the page of it in an event of its own, after the key's."""
        self.page.keyboard.press("Escape")
        self.page.wait_for_function("() => location.hash === '#gallery'")

    def close(self) -> None:
        self.page.close()
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_case.write(tmp_path_factory.mktemp("small"), [f"image {at:03d}" for at in range(100)], labels=LABELS)


@pytest.fixture
def tab(browser: Any, small: Path) -> Iterator[Tab]:
    opened = Tab(browser, small)
    yield opened
    opened.close()


def test_filters_narrow_the_gallery_and_reset_brings_all_back(tab: Tab) -> None:
    count, form = tab.page.locator("#count"), tab.page.locator("#controls")
    assert count.inner_text() == "80 of 80 images of split train" and len(tab.ids()) == 60
    form.locator("[name=tag]").select_option(label="dog")
    assert 20 < int(count.inner_text().split()[0]) < 35
    form.locator("[name=high]").fill("0.5")
    assert all(float(text) <= 0.5 for text in tab.page.locator(".card .value").all_text_contents())
    form.locator("[name=kind]").select_option("2")
    form.locator("[name=query]").fill("NO such")
    assert count.inner_text().startswith("0 of 80") and "Reset" in tab.page.locator(".empty").inner_text()
    tab.page.click("#reset")
    assert count.inner_text().startswith("80 of 80")
    form.locator("[name=query]").fill("003")
    assert tab.ids() == ["image 003"]
    form.locator("[name=query]").fill("")
    form.locator("[name=reason]").select_option("leak")
    assert 0 < int(count.inner_text().split()[0]) < 80


def test_the_order_is_worst_first_and_can_be_turned_and_by_another_figure(tab: Tab) -> None:
    def values() -> list[float]:
        return [float(text) for text in tab.page.locator(".card .value").all_text_contents()]

    assert values() == sorted(values())
    tab.page.select_option("[name=sort]", "best")
    assert values() == sorted(values(), reverse=True)
    tab.page.select_option("[name=figure]", "score")
    assert values()[0] == 0.8
    tab.page.select_option("[name=sort]", "lost")
    assert "▼" in tab.page.locator(".card .value").first.inner_text()


def test_images_are_ordered_and_filtered_by_the_agreement_of_the_methods_at_any_stage(tab: Tab) -> None:
    def values() -> list[float]:
        return [float(text) for text in tab.page.locator(".card .value").all_text_contents()]

    tab.page.select_option("[name=figure]", "method_agreement")
    found = values()
    assert found == sorted(found) and 0 < found[0] < found[-1] <= 1
    assert "method agreement" in tab.page.locator(".card").first.get_attribute("aria-label")
    tab.page.select_option("[name=stage]", "refined")  # it is of the image's last mask
    assert values() == found
    tab.page.locator("[name=low]").fill(str(found[-1]))
    assert 0 < len(values()) < len(found) and min(values()) == found[-1]
    tab.page.locator(".card").first.click()
    told = tab.page.locator("#viewer-side tr", has_text="method agreement").locator("td").all_text_contents()
    assert len(told) == 2 and told[0] == told[1] == f"{found[-1]:.3f}"  # of two methods, each agrees with the other alike


def test_without_truth_the_worst_are_told_by_score_and_agreement(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, [f"i{at}" for at in range(10)], methods=("a", "b", "c"), labels=LABELS, truth=False)
    opened = Tab(browser, path)
    assert opened.page.input_value("[name=figure]") == "score_and_agreement"
    both = [float(text) for text in opened.page.locator(".card .value").all_text_contents()]
    assert both == sorted(both) and opened.ids() != sorted(opened.ids())
    opened.page.select_option("[name=stage]", "predictions")  # there the score stands alone
    alone = opened.page.locator(".card .value").all_text_contents()
    opened.page.select_option("[name=figure]", "score")
    assert alone == opened.page.locator(".card .value").all_text_contents() and "–" not in alone
    opened.close()


def test_stage_and_split_go_together_and_pages_are_turned(tab: Tab) -> None:
    tab.page.click("#page-after")
    assert len(tab.ids()) == 20 and tab.page.locator("#page-after").is_disabled()
    tab.page.select_option("[name=stage]", "predictions")
    assert "split val" in tab.page.locator("#count").inner_text() and tab.pressed() == "predictions"
    assert len(tab.ids()) == 20


def test_every_layer_is_drawn_and_the_slider_fades_it(tab: Tab) -> None:
    layers = ("photograph", "scores", "confidence", "score_maps", "refined", "pseudo_masks", "truth", "error")
    for key, layer in enumerate(layers, 1):
        tab.page.keyboard.press(str(key))
        assert tab.pressed() == layer
        if layer != "photograph":
            assert sum(tab.painted(".card canvas")[1:]) > 0
    tab.page.locator("[name=opacity]").fill("25")
    assert tab.page.locator(".card canvas").first.evaluate("(c) => c.style.opacity") == "0.25"
    tab.page.locator("h2#gallery-title").click()
    tab.page.keyboard.press("]")
    assert tab.page.locator(".card canvas").first.evaluate("(c) => c.style.opacity") == "0.35"


def test_the_error_map_is_what_truth_and_mask_say(tab: Tab) -> None:
    tab.page.keyboard.press("5")  # refined: columns 4 to 15 of a block that goes from 4 to 27, and no 255
    tab.page.keyboard.press("e")
    assert tab.painted(".card canvas") == [0, 24 * 32 - 16 * 12, 16 * 12]
    tab.page.locator(".card").first.click()
    words = tab.page.locator("#viewer-side li", has_text="missed").inner_text()
    assert "25 %" in words


def test_keys_open_step_switch_and_close(tab: Tab) -> None:
    first, second = tab.ids()[:2]
    tab.page.locator(".card").first.focus()
    tab.page.keyboard.press("Enter")
    title = tab.page.locator("#viewer-title")
    assert title.inner_text() == first
    tab.page.keyboard.press("ArrowRight")
    assert title.inner_text() == second
    tab.page.keyboard.press("m")
    tab.page.wait_for_selector("#viewer-side h3:has-text('(weaktr)')")
    tab.page.keyboard.press("s")
    assert tab.page.locator("#viewer-pictures .stack").count() == 2
    tab.page.keyboard.press("t")
    assert tab.pressed() == "truth"
    tab.page.keyboard.press("t")
    assert tab.pressed() == "pseudo_masks"
    tab.leave_viewer()
    assert not tab.page.locator("#viewer").is_visible()
    assert tab.page.evaluate("document.activeElement.classList.contains('card')")
    tab.page.keyboard.press("?")
    assert "error map" in tab.page.locator("#help").inner_text()
    tab.page.keyboard.press("?")
    tab.page.keyboard.press("/")
    tab.page.keyboard.type("me")  # letters go into the search, not to the keys
    assert tab.page.locator("[name=query]").input_value() == "me"


def test_figures_link_to_their_masks_and_panels_switch(tab: Tab) -> None:
    tab.page.locator(".overview a.figure").nth(6).click()
    assert tab.page.url.endswith("#weaktr/refined/")
    assert tab.page.input_value("[name=method]") == "weaktr" and tab.pressed() == "refined"
    tab.page.click('[data-panels=classes] [data-panel="predictions"]')
    assert tab.page.locator('[data-panel-of=classes][data-name="predictions"]').is_visible()
    assert not tab.page.locator('[data-panel-of=classes][data-name="pseudo_masks"]').is_visible()
    tab.page.click('[data-panels=methods] button:has-text("weaktr")')
    assert tab.page.locator("#method-1").is_visible() and not tab.page.locator("#method-0").is_visible()


def test_the_theme_is_switched_and_texts_keep_their_contrast(tab: Tab) -> None:
    ratio = """(pair) => {
      const style = getComputedStyle(document.documentElement);
      const light = (name) => {
        const hex = style.getPropertyValue(name).trim().slice(1);
        const parts = [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255);
        const [r, g, b] = parts.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const [a, b] = pair.map(light).sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }"""
    seen = set()
    for _ in range(3):
        tab.page.click("#theme")
        seen.add(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for text in ("--ink", "--soft", "--accent", "--good", "--bad"):
            for ground in ("--paper", "--panel"):
                assert tab.page.evaluate(ratio, [text, ground]) >= 4.5, (text, ground)
    assert len(seen) == 2


def test_every_control_has_a_name_and_every_picture_a_text(tab: Tab) -> None:
    code = """() => [...document.querySelectorAll('button, select, input, img, svg, canvas[role]')].filter((one) =>
      !(one.textContent.trim() || one.alt || one.ariaLabel || one.labels?.length)).map((one) => one.outerHTML)"""
    tab.page.locator(".card").first.click()
    assert tab.page.evaluate(code) == []


def test_a_narrow_window_does_not_scroll_sideways(browser: Any, small: Path) -> None:
    opened = Tab(browser, small, width=380)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 380
    opened.close()


def test_hostile_names_are_texts_and_each_has_its_address(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, HOSTILE_IDS, labels=HOSTILE, palette="safe")
    opened = Tab(browser, path)
    known = set(opened.ids())
    opened.page.select_option("[name=stage]", "predictions")
    assert known | set(opened.ids()) == set(HOSTILE_IDS)
    options = opened.page.locator("[name=tag] option").all_text_contents()
    assert options == ["any", *HOSTILE.names]
    for image_id in ("ü ñ 漢字/🐄", "100% #hash?x=1", "</script><b>bold</b>", "../../etc/passwd"):
        at = opened.page.evaluate(
            "(id) => JSON.parse(document.getElementById('report-data').textContent).images.ids.indexOf(id)", image_id
        )
        opened.page.locator("[name=stage]").select_option("pseudo_masks")
        if not opened.page.locator(f'.card[data-at="{at}"]').count():
            opened.page.locator("[name=stage]").select_option("predictions")
        opened.page.locator(f'.card[data-at="{at}"]').click()
        address = opened.page.url.partition("#")[2]
        assert opened.page.locator("#viewer-title").inner_text() == image_id
        opened.leave_viewer()
        again = Tab(browser, path, "#" + address)
        assert again.page.locator("#viewer-title").inner_text() == image_id and again.page.locator("#viewer").is_visible()
        again.close()
    code = "[...document.scripts].filter((script) => script.type !== 'application/json').length"
    assert opened.page.evaluate(code) == 1 and opened.page.locator("main b").count() == 0
    opened.close()


def test_an_address_of_nothing_is_told(browser: Any, small: Path) -> None:
    opened = Tab(browser, small, "#cam/pseudo_masks/nobody")
    assert opened.page.locator("#count").inner_text() == "The gallery has no picture of nobody."
    opened.close()


def test_side_by_side_says_which_gallery_lacks_an_image(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, ["a", "b", "c"], labels=LABELS, dropped=["b"])
    opened = Tab(browser, path)
    opened.page.keyboard.press("s")
    opened.page.wait_for_selector(".message")
    assert opened.page.locator(".message").all_text_contents() == ["not in the gallery of weaktr"]
    opened.page.keyboard.press("m")
    assert sorted(opened.ids()) == ["a", "c"]
    opened.close()


def test_without_truth_the_gallery_goes_by_the_label_free_score(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, [f"i{at}" for at in range(10)], labels=LABELS, truth=False)
    opened = Tab(browser, path)
    assert opened.page.input_value("[name=figure]") == "score" and "no ground truth" in opened.page.inner_text("#stages")
    assert opened.page.locator("#layers button").all_text_contents()[-1].startswith("pseudo-mask")
    opened.close()


def test_pictures_that_are_too_large_together_are_loaded_from_beside_when_shown(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "INLINE_BYTES", 1000)
    monkeypatch.setattr(blocks, "PER_BLOCK", 30)
    path = page_case.write(tmp_path, [f"i{at:03d}" for at in range(150)], labels=LABELS, methods=("cam",))
    assert len(list(path.parent.glob("data-*.js"))) == 5
    opened = Tab(browser, path)
    first = [url for url in opened.requests if "data-" in url]
    assert 1 <= len(first) < 5
    opened.page.keyboard.press("ArrowRight")
    opened.page.wait_for_function(
        "() => document.querySelectorAll('.card img[src]').length === document.querySelectorAll('.card').length"
    )
    assert len([url for url in opened.requests if "data-" in url]) > len(first)
    opened.close()


def test_provenance_is_read_from_beside_the_report_or_missed_politely(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, ["a", "b"], labels=LABELS)
    (tmp_path / "provenance").mkdir()
    (tmp_path / "provenance" / "train@cam.json").write_text(
        '{"stage": "train@cam", "seconds": 12.5, "versions": {"torch": "2"}}'
    )
    provenance.write_script(tmp_path / "provenance")
    opened = Tab(browser, path)
    opened.page.click("#provenance-load")
    opened.page.wait_for_selector("#provenance-table td")
    assert "train@cam" in opened.page.inner_text("#provenance-table") and "12.5" in opened.page.inner_text(
        "#provenance-table"
    )
    opened.close()
    shutil.rmtree(tmp_path / "provenance")
    opened = Tab(browser, path)
    opened.page.click("#provenance-load")
    opened.page.wait_for_function("() => document.getElementById('provenance-note').textContent.includes('not there')")
    opened.complaints.clear()  # the browser tells of the missing file
    opened.close()


def rows_shown(opened: Tab) -> list[str]:
    return opened.page.locator("#images-rows tr th").all_text_contents()


def test_the_table_of_images_is_ordered_filtered_paged_and_leads_to_the_pictures(tab: Tab) -> None:
    count, form = tab.page.locator("#images-count"), tab.page.locator("#images-controls")

    def after(text: str) -> list[str]:
        tab.page.wait_for_function("(text) => document.getElementById('images-count').textContent === text", arg=text)
        return rows_shown(tab)

    def scores() -> list[float]:
        return [float(text) for text in tab.page.locator("#images-rows tr td:nth-child(3)").all_text_contents()]

    assert len(after("1 to 50 of 80")) == 50 and scores() == sorted(scores()) and scores()[0] == 0
    tab.page.click("#images-last")
    assert len(after("51 to 80 of 80")) == 30 and tab.page.locator("#images-after").is_disabled()
    form.locator("[name=order]").select_option("best")
    after("1 to 50 of 80")
    tab.page.wait_for_function("() => document.querySelector('#images-rows td:nth-child(3)').textContent === '0.800'")
    assert scores() == sorted(scores(), reverse=True)
    form.locator("[name=reason]").select_option("0")
    assert len(after("1 to 40 of 40")) == 40 and form.locator("[name=order] option[value=id]").is_disabled()
    form.locator("[name=split]").select_option("val")
    assert len(after("1 to 20 of 20")) == 20 and form.locator("[name=reason]").input_value() == ""
    form.locator("[name=id]").fill("image 05")
    tab.page.wait_for_function("() => document.querySelector('#images-rows th').textContent === 'image 054'")
    form.locator("[name=split]").select_option("train")
    form.locator("[name=id]").fill("image 050")
    after("41 to 80 of 80")
    tab.page.locator("#images-rows a", has_text="image 050").click()
    assert tab.page.locator("#viewer-title").inner_text() == "image 050" and count.is_visible()


def test_rows_of_many_images_lie_beside_the_page_and_few_of_them_are_loaded(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "INLINE_BYTES", 1000)
    monkeypatch.setattr(image_table, "PER_PAGE", 60)
    path = page_case.write(
        tmp_path, HOSTILE_IDS + tuple(f"i{at:03d}" for at in range(300)), labels=HOSTILE, methods=("cam",)
    )
    opened = Tab(browser, path)

    def requested() -> list[str]:
        return [url.rpartition("/")[2] for url in opened.requests if "/rows/" in url]

    opened.page.wait_for_selector("#images-rows tr")
    assert requested() == ["0-train-quality-0000.js"]
    opened.page.locator("#images-controls [name=id]").fill("i25")
    opened.page.wait_for_function("() => document.querySelector('#images-rows th').textContent.startsWith('i25')")
    assert len(requested()) <= 3 and all("0-train-id-" in name for name in requested()[1:])
    opened.page.locator("#images-controls [name=id]").fill("ü")
    opened.page.wait_for_function("() => document.querySelector('#images-rows th').textContent.startsWith('ü')")
    assert opened.page.locator("#images b").count() == 0
    opened.close()


def test_classes_are_sorted_and_searched(browser: Any, tmp_path: Path) -> None:
    names = [f"class {at:02d}" for at in range(80)]
    path = page_case.write(tmp_path, ["a", "b"], labels=LabelSpace(tuple(names)), methods=("cam",))
    figures = json.loads((tmp_path / "audit" / "cam.json").read_text(encoding="utf-8"))
    stage = figures["stages"]["pseudo_masks"]
    ious = {name: None if at == 5 else (at * 37 % 81) / 81 for at, name in enumerate(stage["classes"])}
    stage["classes"] = {name: rates | {"iou": ious[name]} for name, rates in stage["classes"].items()}
    (tmp_path / "audit" / "cam.json").write_text(json.dumps(figures), encoding="utf-8")
    page.write(tmp_path / "report", page_case.inputs_of(tmp_path), ["cam"], Report("t", "voc", 1))
    opened = Tab(browser, path)
    table = opened.page.locator('[data-panel-of=classes][data-name="pseudo_masks"] table')

    def column(at: int) -> list[str]:
        return [text.strip() for text in table.locator(f"tbody tr:visible > :nth-child({at})").all_inner_texts()]

    assert column(1) == ["background", *names]
    table.locator("thead button", has_text="cam").click()
    ious = [float(text) for text in column(2) if text != "–"]
    assert ious == sorted(ious) and len(ious) == 80 and column(2)[-1] == "–"
    table.locator("thead button", has_text="cam").click()
    assert [float(text) for text in column(2)[:80]] == ious[::-1] and column(2)[-1] == "–"
    assert table.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"
    opened.page.fill("#class-query", "SS 1")
    assert sorted(column(1)) == names[10:20]
    opened.page.fill("#class-query", "")
    table.locator("thead button", has_text="cam").click()
    assert column(1) == ["background", *names]
    opened.close()


def test_history_is_read_from_beside_the_report_with_a_line_per_stage(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, ["a", "b"], labels=LABELS)
    (tmp_path / "provenance").mkdir()
    figures = {"miou": {"refined": 0.5}, "coverage": {}}
    points = [
        {"commit": "", "date": "", "subject": "", "miou": {"refined": 0.625}, "coverage": {}},
        {"commit": "0123456789", "date": "2026-01-02", "subject": "<b>first", **figures},
    ]
    text = f"tag2mask.history({as_script({'cam': points, 'weaktr': []})});"
    (tmp_path / "provenance" / "history.js").write_text(text, encoding="utf-8")
    opened = Tab(browser, path)
    opened.page.click("#history-load")
    opened.page.wait_for_selector("#history-tables td")
    cells = opened.page.locator("#history-tables tbody tr > *").all_inner_texts()
    assert cells[0] == "refined" and cells[2:] == ["0.625", "0.500"]
    assert opened.page.locator("#history-tables svg").get_attribute("aria-label") == "0.500 → 0.625"
    headings = opened.page.locator("#history-tables thead th")
    assert "0123456" in headings.nth(3).inner_text() and headings.nth(3).get_attribute("title") == "<b>first"
    opened.close()


def test_what_a_reader_must_know_first_stands_at_the_top_as_text(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, ["a", "b"], labels=LABELS, truth=False)
    figures = json.loads((tmp_path / "audit" / "cam.json").read_text(encoding="utf-8"))
    figures |= {"supervision": "tags + <i>saliency", "empty_masks": {"message": "no <b>cat", "advice": "more <b>steps"}}
    (tmp_path / "audit" / "cam.json").write_text(json.dumps(figures), encoding="utf-8")
    page.write(
        tmp_path / "report", page_case.inputs_of(tmp_path), ["cam", "weaktr", "afa"], Report("t", "voc", 1), {"weaktr"}
    )
    opened = Tab(browser, path)
    alarm = opened.page.locator("#stages [role=alert]")
    assert alarm.inner_text().split("\n")[0] == "cam: no <b>cat" and "more <b>steps" in alarm.inner_text()
    assert alarm.evaluate("(one) => getComputedStyle(one).color") == "rgb(168, 7, 26)"
    notes = opened.page.locator("#stages .note").all_inner_texts()
    assert notes[0].startswith("afa is not on this page: not evaluated yet.") and notes[1].startswith(
        "weaktr is out of date"
    )
    first = opened.page.locator(".overview tbody tr").first
    assert "tags + <i>saliency" in first.inner_text()
    assert first.locator("td").first.inner_text().split("\n") == ["20.0 %", "empty tags 10.0 %", "with reasons 50.0 %"]
    opened.close()


def test_paper_shows_figures_and_tables_and_no_controls(tab: Tab) -> None:
    tab.page.emulate_media(media="print")
    for hidden in (".bar", "#gallery", "#images", "#history", "[data-panels=methods]", "#class-query"):
        assert not tab.page.locator(hidden).first.is_visible(), hidden
    for shown in (".overview", "#method-0 table", "#method-1 table", "#classes table >> visible=true"):
        assert tab.page.locator(shown).first.is_visible(), shown
    tab.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.page.locator("details:not([open])").count() == 0
    assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_thousand_images_are_one_page_that_shows_sixty_at_a_time(browser: Any, tmp_path: Path) -> None:
    path = page_case.write(tmp_path, [f"image {at:04d}" for at in range(1000)], labels=LABELS)
    opened = Tab(browser, path)
    assert "800 of 800" in opened.page.locator("#count").inner_text() and len(opened.ids()) == 60
    opened.close()


def test_the_page_of_dvc_plots_show_asks_no_network(browser: Any, tmp_path: Path) -> None:
    pytest.importorskip("vl_convert", reason="no vl-convert-python: make setup")
    from stages import plots_page

    assert CliRunner().invoke(plots_page.main, [str(tmp_path / "plots.html")]).exit_code == 0
    for name, text in {
        ".dvc/config": "[core]\n no_scm = true\n analytics = false\n[plots]\n html_template = ../plots.html\n",
        "dvc.yaml": "plots:\n- losses.csv: {x: step, y: loss, title: losses}\n",
        "losses.csv": "step,loss\n1,0.5\n2,0.25\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    told = subprocess.run(
        [sys.executable, "-m", "dvc", "plots", "show"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    opened, requests = browser.new_page(), []
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto((tmp_path / "dvc_plots" / "index.html").as_uri())
    opened.wait_for_selector("svg.marks", timeout=30_000)
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    opened.close()
