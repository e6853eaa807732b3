"""Figures → small SVG drawings. Numbers and stage names only; colours come from the page's style sheet by class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

Point = tuple[float, float]


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, label: str, *parts: str) -> Markup:
    """The parts are markup already; the label is escaped."""
    head = Markup('<svg viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img" aria-label="{label}">')
    return head.format(w=width, h=height, label=label) + Markup("".join(parts)) + Markup("</svg>")


def text_of(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    made = Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>')
    return made.format(x, y, kind, anchor, words)


def interval(value: float, low: float, high: float) -> Markup:
    """A figure in 0..1 as a dot on a line, with its interval."""
    w, h = 88, 8
    return _svg(
        w, h, f"{value:.3f}, between {low:.3f} and {high:.3f}",
        f'<line class="axis" x1="0" y1="4" x2="{w}" y2="4"/>',
        f'<line class="range" x1="{low * w:.1f}" y1="4" x2="{high * w:.1f}" y2="4"/>',
        f'<circle class="dot" cx="{value * w:.1f}" cy="4" r="2.5"/>',
    )  # fmt: skip


def sparkline(values: Sequence[float | None]) -> Markup:
    """Stages from left to right; a gap where a stage has no figure. The lowest and highest figure span the height."""
    known = [value for value in values if value is not None]
    if not known:
        return Markup("")
    w, h, low, high = 84, 26, min(known), max(known)
    step = (w - 12) / max(1, len(values) - 1)
    dots = [
        (6 + at * step, h - 6 - (h - 12) * ((value - low) / (high - low) if high > low else 0.5))
        for at, value in enumerate(values)
        if value is not None
    ]
    words = " → ".join(f"{value:.3f}" for value in known)
    marks = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{2.6 if (x, y) == dots[-1] else 1.6}"/>' for x, y in dots]
    return _svg(w, h, words, f'<polyline class="line" points="{_points(dots)}"/>', *marks)


def threshold(curve: Sequence[Point], told: Mapping[str, Any]) -> Markup:
    """mIoU over the threshold; the chosen threshold is a full dot, the oracle a ring."""
    if not curve:
        return Markup("")
    w, h, left, top, right, bottom = 340, 190, 40, 12, 12, 30
    highest = max(max(y for _, y in curve), 0.1)

    def at(point: Point) -> Point:
        x = left + (w - left - right) * point[0]
        return x, h - bottom - (h - top - bottom) * point[1] / highest

    parts = []
    for share in (0, 0.5, 1):
        y = at((0, highest * share))[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{w - right}" y2="{y:.1f}"/>')
        parts.append(text_of(left - 6, y + 4, f"{highest * share:.2f}", anchor="end"))
    for x in (0, 0.25, 0.5, 0.75, 1):
        parts.append(text_of(at((x, 0))[0], h - 12, f"{x:g}"))
    parts.append(f'<polyline class="line" points="{_points([at(point) for point in curve])}"/>')
    words = "mIoU of the score maps over the threshold"
    for name, miou, kind in (("oracle", "miou_at_oracle", "ring"), ("chosen", "miou_at_chosen", "dot")):
        if told.get(name) is not None and told.get(miou) is not None:
            x, y = at((min(1.0, told[name]), min(highest, told[miou])))
            title = f"{name}: {told[name]:.3f}, mIoU {told[miou]:.3f}"
            parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
            words += f"; {title}"
    return _svg(w, h, words, *parts)


def reliability(bins: Sequence[Sequence[float]]) -> Markup:
    """[[confidence, accuracy, share of pixels] …] as dots around the diagonal; a dot's area shows its share."""
    w, h, left, bottom = 190, 190, 34, 30
    side = w - left - 10

    def at(x: float, y: float) -> Point:
        return left + side * x, h - bottom - side * y

    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts = [f'<rect class="frame" x="{x0:.1f}" y="{y1:.1f}" width="{side}" height="{side}"/>',
             f'<line class="grid" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>']  # fmt: skip
    for value in (0, 0.5, 1):
        parts.append(text_of(at(value, 0)[0], h - 12, f"{value:g}"))
        parts.append(text_of(left - 6, at(0, value)[1] + 4, f"{value:g}", anchor="end"))
    known = [(c, a, s) for c, a, s in bins if c is not None and a is not None]
    parts.append(f'<polyline class="line" points="{_points([at(c, a) for c, a, _ in known])}"/>')
    for c, a, s in known:
        x, y = at(c, a)
        title = f"confidence {c:.2f}, right {a:.2f}, {100 * (s or 0):.1f} % of pixels"
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{1.5 + 7 * (s or 0) ** 0.5:.1f}"><title>{title}</title></circle>'
        )
    return _svg(w, h, "share of right pixels over confidence", *parts)


def flow(steps: Sequence[Mapping[str, Any]], right: Mapping[str, float]) -> Markup:
    """What becomes of right and wrong pixels from stage to stage. right: share of right pixels per stage.

    Bars are the stages; what is wrong lies below. Of the right pixels only as much is drawn as helps to see the rest.
    """
    names = [steps[0]["from"], *(step["to"] for step in steps)]
    known = [right[name] for name in names if name in right]
    if not known:
        return Markup("")
    least = min([*known, *(right.get(step["from"], 1) - step["all"]["broken"] for step in steps)])
    floor = max(0.0, 1 - 1.6 * (1 - least))
    w, h, top, bar, gap = 150 * len(names), 216, 34, 12, 150

    def height(share: float) -> float:
        return 140 * share / (1 - floor)

    parts, x = [], 40.0
    for at, name in enumerate(names):
        good = right.get(name, known[-1])
        y = top + height(good - floor)
        if at < len(steps):
            step = steps[at]
            corrected, broken = step["all"]["corrected"], step["all"]["broken"]
            after = top + height(right.get(step["to"], good) - floor)
            end, left = x + gap, x + bar
            kept = top + height(good - broken - floor)
            words = f"{step['from']} to {step['to']}: {100 * corrected:.2f} % corrected, {100 * broken:.2f} % broken"
            parts += [
                _band(left, end, (top, kept), (top, kept), "kept"),
                _band(left, end, (y + height(corrected), top + 140), (after + height(broken), top + 140), "missed"),
                _band(left, end, (kept, y), (after, after + height(broken)), "broken", words),
                _band(left, end, (y, y + height(corrected)), (after - height(corrected), after), "corrected", words),
                text_of((left + end) / 2, top + 160, f"corrected {100 * corrected:.1f} %", "corrected-text"),
                text_of((left + end) / 2, top + 175, f"broken {100 * broken:.1f} %", "broken-text"),
            ]
        parts.append(f'<rect class="right-bar" x="{x:.1f}" y="{top}" width="{bar}" height="{height(good - floor):.1f}"/>')
        parts.append(f'<rect class="wrong-bar" x="{x:.1f}" y="{y:.1f}" width="{bar}" height="{height(1 - good):.1f}"/>')
        parts.append(text_of(x + bar / 2, 12, str(name).replace("_", " ").removesuffix(" val"), "name"))
        parts.append(text_of(x + bar / 2, 27, f"{100 * good:.1f} %"))
        x += gap
    words = "; ".join(
        f"{step['from']} to {step['to']}: {100 * step['all']['corrected']:.2f} % of pixels corrected, "
        f"{100 * step['all']['broken']:.2f} % broken" for step in steps
    )  # fmt: skip
    return _svg(w - gap + 110, h, words, *parts)


def _band(left: float, right: float, start: Point, end: Point, kind: str, words: str = "") -> str:
    middle = (left + right) / 2
    path = (
        f"M{left:.1f},{start[0]:.1f} C{middle:.1f},{start[0]:.1f} {middle:.1f},{end[0]:.1f} {right:.1f},{end[0]:.1f} "
        f"L{right:.1f},{end[1]:.1f} C{middle:.1f},{end[1]:.1f} {middle:.1f},{start[1]:.1f} {left:.1f},{start[1]:.1f} Z"
    )
    return Markup('<path class="band {}" d="{}"><title>{}</title></path>').format(kind, path, words)
