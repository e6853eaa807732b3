"""A finished demo → the pictures of README.md and of the docs: what the stages make, and the report in a browser.

    make demo && python -m docs.pictures.make

The drawn scenes are CC0. The images are those whose own mIoU is nearest to the median of all with two tags or more, so they
are neither the best nor the worst. The report's picture needs chromium.
"""

from __future__ import annotations

import csv
import shutil
import statistics
from io import BytesIO
from pathlib import Path

import click
import numpy as np
import yaml
from PIL import Image, ImageDraw, ImageFont

from pipeline.core import records, store
from pipeline.core.labels import BACKGROUND, IGNORE
from pipeline.core.records import ImageRecord
from pipeline.imaging.palette import heat, voc_palette
from pipeline.imaging.planes import upsample
from pipeline.jobs.segment_folder import overlay

HERE = Path(__file__).parent
CELL, GAP, LEFT, HEAD, LINE = 256, 18, 2, 66, 40  # px
INK, PALE = (31, 35, 40), (89, 99, 110)
HEADINGS = (
    ("photograph", "with its tags: all you give"),
    ("score map", "a method's, from the tags"),
    ("pseudo-mask", "refined: the product"),
    ("new photograph", "no tags"),
    ("prediction", "by a segmenter trained on the masks"),
)


@click.command()
@click.option("--project", type=click.Path(path_type=Path), default=Path(), help="A folder in which `make demo` has run.")
@click.option("--run", "run_name", default="weaktr", show_default=True, help="The run whose masks are shown.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE, help="Folder of the pictures.")
def main(project: Path, run_name: str, out: Path) -> None:
    """Draws stages.webp, and takes report.webp and gallery.webp with chromium."""
    stages(project, run_name).save(out / "stages.webp", quality=88, method=6)
    screenshots(project / "report" / "index.html", run_name, out)
    for name in ("stages", "report", "gallery"):
        click.echo(out / f"{name}.webp")


def stages(project: Path, run_name: str, rows: int = 2) -> Image.Image:
    """A row per training image: photograph, score map, pseudo-mask; and beside it a val image with its prediction."""
    root = project / yaml.safe_load((project / "params.yaml").read_text("utf-8"))["dataset"]["root"]
    listed = records.read(project / "data" / "records.h5")
    artifacts, audit = project / "artifacts" / run_name, project / "audit" / f"{run_name}.csv"
    maps = store.Store(artifacts / "scoremaps", store.SCORE_MAPS)
    masks = store.Store(artifacts / "pseudo_masks", store.PSEUDO_MASKS)
    predictions = store.Store(artifacts / "predictions", store.PREDICTIONS)

    step = CELL + GAP
    width = LEFT + 5 * step + 2 * GAP
    sheet = Image.new("RGB", (width, HEAD + rows * (CELL + LINE)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = [LEFT + column * step + (2 * GAP if column > 2 else 0) for column in range(5)]
    for left, (name, about) in zip(lefts, HEADINGS, strict=True):
        draw.text((left, 4), name, INK, ImageFont.load_default(24))
        draw.text((left, 36), about, PALE, ImageFont.load_default(15))
    train = typical(audit, listed.split("train"), "pseudo_masks", rows)
    val = typical(audit, listed.split("val"), "predictions", rows)
    for row, (seen, new) in enumerate(zip(train, val, strict=True)):
        top = HEAD + row * (CELL + LINE)
        photograph, unseen = records.read_image(seen, root), records.read_image(new, root)
        mask, prediction = masks.read(seen.id, "mask"), predictions.read(new.id, "label")
        scores = upsample(maps.read(seen.id, "scores").astype(np.float32), seen.size).max(axis=0)
        pictures = (
            photograph,
            heat(scores),
            coloured(photograph, mask),
            unseen,
            coloured(unseen, prediction),
        )
        for left, picture in zip(lefts, pictures, strict=True):
            sheet.paste(Image.fromarray(picture).resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
        legend(draw, lefts[0], top + CELL + 6, "tags:", list(seen.tags or ()), listed.labels.names)
        shown = [value - 1 for value in np.unique(prediction) if BACKGROUND < value < IGNORE]
        legend(draw, lefts[4], top + CELL + 6, "", shown, listed.labels.names)
    line = lefts[3] - (GAP + 2 * GAP) // 2
    draw.line((line, 4, line, sheet.height - LINE), (209, 217, 224), 2)
    return sheet


def coloured(photograph: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """u8[h,w,3] with the colours of the mask u8[h,w]; what is background is darker."""
    return overlay(np.where((mask == BACKGROUND)[..., None], photograph // 3, photograph), mask)


def legend(draw: ImageDraw.ImageDraw, left: int, top: int, title: str, classes: list[int], names: tuple[str, ...]) -> None:
    """A line of class names, each after a square in its colour."""
    font = ImageFont.load_default(17)
    draw.text((left, top), title, PALE, font)
    left += int(draw.textlength(title + " ", font)) if title else 0
    for index in classes:
        draw.rectangle((left, top + 5, left + 12, top + 17), tuple(int(value) for value in voc_palette()[index + 1]))
        draw.text((left + 17, top), names[index], INK, font)
        left += 17 + int(draw.textlength(names[index], font)) + 10


def typical(audit: Path, candidates: tuple[ImageRecord, ...], stage: str, count: int) -> list[ImageRecord]:
    """The images with two tags or more whose own mIoU at `stage` is nearest to their median."""
    with audit.open(encoding="utf-8", newline="") as file:
        miou = {row["id"]: float(row["miou"]) for row in csv.DictReader(file) if row["stage"] == stage and row["miou"]}
    chosen = [record for record in candidates if record.id in miou and len(record.tags or ()) > 1]
    median = statistics.median(miou[record.id] for record in chosen)
    return sorted(chosen, key=lambda record: (abs(miou[record.id] - median), record.id))[:count]


def screenshots(page: Path, run_name: str, out: Path) -> None:
    """The report's first screen and its gallery of one run, as chromium shows them."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise click.ClickException("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, address, top in (("report", "", "body"), ("gallery", f"#{run_name}/pseudo_masks/", "#gallery")):
            tab = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
            tab.goto(page.resolve().as_uri() + address)
            tab.wait_for_selector(".card img[src]")
            tab.locator(top).evaluate("element => element.scrollIntoView()")
            tab.wait_for_timeout(500)  # pictures on the screen are decoded late
            with Image.open(BytesIO(tab.screenshot())) as picture:
                picture.convert("RGB").save(out / f"{name}.webp", quality=82, method=6)
        browser.close()


if __name__ == "__main__":
    main()
