"""Figures → small SVG charts. Numbers and stage names only; colours come from the page's style sheet by class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

Point = tuple[float, float]

TOP, HEIGHT, BAR, GAP = 34, 140, 12, 150  # px of the flow chart: above the bars, of a bar, width of a bar, from bar to bar


def _points(points: Sequence[Point]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _svg(width: float, height: float, label: str, *parts: str) -> Markup:
    """parts are markup already; the label is escaped."""
    template = Markup('<svg viewBox="0 0 {w:g} {h:g}" width="{w:g}" height="{h:g}" role="img" aria-label="{label}">')
    return template.format(w=width, h=height, label=label) + Markup("".join(parts)) + Markup("</svg>")


def _text(x: float, y: float, text: str, css_class: str = "", anchor: str = "middle") -> str:
    template = Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>')
    return template.format(x, y, css_class, anchor, text)


def interval(value: float, low: float, high: float) -> Markup:
    """A figure as a dot on an axis from 0 to 1, with its interval; all in 0..1."""
    w, h = 88, 8
    return _svg(
        w, h, f"{value:.3f}, between {low:.3f} and {high:.3f}",
        f'<line class="axis" x1="0" y1="4" x2="{w}" y2="4"/>',
        f'<line class="range" x1="{low * w:.1f}" y1="4" x2="{high * w:.1f}" y2="4"/>',
        f'<circle class="dot" cx="{value * w:.1f}" cy="4" r="2.5"/>',
    )  # fmt: skip


def sparkline(values: Sequence[float | None]) -> Markup:
    """Figures of the stages from left to right; None is skipped. The lowest and the highest figure span the height."""
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
    label = " → ".join(f"{value:.3f}" for value in known)
    circles = [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{2.6 if (x, y) == dots[-1] else 1.6}"/>' for x, y in dots]
    return _svg(w, h, label, f'<polyline class="line" points="{_points(dots)}"/>', *circles)


def threshold_curve(curve: Sequence[Point], thresholds: Mapping[str, Any]) -> Markup:
    """mIoU over the threshold; the chosen threshold is a full dot, the oracle a ring.

    curve: (threshold, mIoU), both 0..1; thresholds: `threshold` of audit/<run>.json. Empty without a curve.
    """
    if not curve:
        return Markup("")
    w, h, left, top, right, bottom = 340, 190, 40, 12, 12, 30
    highest = max(max(y for _, y in curve), 0.1)

    def at(point: Point) -> Point:
        x = left + (w - left - right) * point[0]
        return x, h - bottom - (h - top - bottom) * point[1] / highest

    parts = []
    for fraction in (0, 0.5, 1):
        y = at((0, highest * fraction))[1]
        parts.append(f'<line class="grid" x1="{left}" y1="{y:.1f}" x2="{w - right}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{highest * fraction:.2f}", anchor="end"))
    for x in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(at((x, 0))[0], h - 12, f"{x:g}"))
    parts.append(f'<polyline class="line" points="{_points([at(point) for point in curve])}"/>')
    label = "mIoU of the score maps over the threshold"
    for name, miou, css_class in (("oracle", "miou_at_oracle", "ring"), ("chosen", "miou_at_chosen", "dot")):
        if thresholds.get(name) is not None and thresholds.get(miou) is not None:
            x, y = at((min(1.0, thresholds[name]), min(highest, thresholds[miou])))
            title = f"{name}: {thresholds[name]:.3f}, mIoU {thresholds[miou]:.3f}"
            parts.append(f'<circle class="{css_class}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{title}</title></circle>')
            label += f"; {title}"
    return _svg(w, h, label, *parts)


def reliability(bins: Sequence[Sequence[float | None]]) -> Markup:
    """Reliability diagram with its diagonal: bins [confidence, accuracy, fraction of pixels] as dots, whose area grows
    with the fraction. Bins without pixels hold None."""
    w, h, left, bottom = 190, 190, 34, 30
    side = w - left - 10

    def at(x: float, y: float) -> Point:
        return left + side * x, h - bottom - side * y

    (x0, y0), (x1, y1) = at(0, 0), at(1, 1)
    parts = [f'<rect class="frame" x="{x0:.1f}" y="{y1:.1f}" width="{side}" height="{side}"/>',
             f'<line class="grid" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>']  # fmt: skip
    for value in (0, 0.5, 1):
        parts.append(_text(at(value, 0)[0], h - 12, f"{value:g}"))
        parts.append(_text(left - 6, at(0, value)[1] + 4, f"{value:g}", anchor="end"))
    known = [(x, y, fraction or 0) for x, y, fraction in bins if x is not None and y is not None]
    parts.append(f'<polyline class="line" points="{_points([at(x, y) for x, y, _ in known])}"/>')
    for confidence, accuracy, fraction in known:
        x, y = at(confidence, accuracy)
        title = f"confidence {confidence:.2f}, accuracy {accuracy:.2f}, {100 * fraction:.1f} % of pixels"
        circle = f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{1.5 + 7 * fraction**0.5:.1f}">'
        parts.append(f"{circle}<title>{title}</title></circle>")
    return _svg(w, h, "accuracy over confidence", *parts)


def flow(steps: Sequence[Mapping[str, Any]], accuracy: Mapping[str, float]) -> Markup:
    """Flow of correct and wrong pixels from stage to stage. accuracy: fraction of correct pixels per stage, 0..1.

    A bar per stage, correct pixels above wrong ones. Where accuracies are high, the axis starts above 0.
    """
    names = [steps[0]["from"], *(step["to"] for step in steps)]
    known = [accuracy[name] for name in names if name in accuracy]
    if not known:
        return Markup("")
    lowest = min([*known, *(accuracy.get(step["from"], 1) - step["all"]["broken"] for step in steps)])
    scale = _FlowScale(max(0.0, 1 - 1.6 * (1 - lowest)))
    parts, x = [], 40.0
    for at, name in enumerate(names):
        value = accuracy.get(name, known[-1])
        if at < len(steps):
            parts += _flow_bands(steps[at], value, accuracy.get(steps[at]["to"], value), x, scale)
        y = scale.y(value)
        correct, wrong = scale.height(value - scale.floor), scale.height(1 - value)
        parts.append(f'<rect class="correct-bar" x="{x:.1f}" y="{TOP}" width="{BAR}" height="{correct:.1f}"/>')
        parts.append(f'<rect class="wrong-bar" x="{x:.1f}" y="{y:.1f}" width="{BAR}" height="{wrong:.1f}"/>')
        parts.append(_text(x + BAR / 2, 12, str(name).replace("_", " ").removesuffix(" val"), "name"))
        parts.append(_text(x + BAR / 2, 27, f"{100 * value:.1f} %"))
        x += GAP
    label = "; ".join(
        f"{step['from']} to {step['to']}: {100 * step['all']['corrected']:.2f} % of pixels corrected, "
        f"{100 * step['all']['broken']:.2f} % broken" for step in steps
    )  # fmt: skip
    return _svg(GAP * (len(names) - 1) + 110, 216, label, *parts)


@dataclass(frozen=True)
class _FlowScale:
    """Accuracies from `floor` to 1 → px."""

    floor: float

    def height(self, fraction: float) -> float:
        return HEIGHT * fraction / (1 - self.floor)

    def y(self, accuracy: float) -> float:
        """Lower end of the bar of correct pixels."""
        return TOP + self.height(accuracy - self.floor)


def _flow_bands(step: Mapping[str, Any], before: float, after: float, x: float, scale: _FlowScale) -> list[str]:
    """The four bands of a step, from the bar at x to the next, and their texts. before, after: accuracies of its stages."""
    corrected, broken = step["all"]["corrected"], step["all"]["broken"]
    left, right, bottom = x + BAR, x + GAP, TOP + HEIGHT
    y_before, y_after, stays_correct = scale.y(before), scale.y(after), scale.y(before - broken)
    up, down = scale.height(corrected), scale.height(broken)
    title = f"{step['from']} to {step['to']}: {100 * corrected:.2f} % corrected, {100 * broken:.2f} % broken"
    middle = (left + right) / 2
    return [
        _band(left, right, (TOP, stays_correct), (TOP, stays_correct), "stays-correct"),
        _band(left, right, (y_before + up, bottom), (y_after + down, bottom), "stays-wrong"),
        _band(left, right, (stays_correct, y_before), (y_after, y_after + down), "broken", title),
        _band(left, right, (y_before, y_before + up), (y_after - up, y_after), "corrected", title),
        _text(middle, bottom + 20, f"corrected {100 * corrected:.1f} %", "corrected-text"),
        _text(middle, bottom + 35, f"broken {100 * broken:.1f} %", "broken-text"),
    ]


def _band(left: float, right: float, start: Point, end: Point, css_class: str, title: str = "") -> str:
    """start, end: upper and lower y at the left and at the right side."""
    middle = (left + right) / 2
    path = (
        f"M{left:.1f},{start[0]:.1f} C{middle:.1f},{start[0]:.1f} {middle:.1f},{end[0]:.1f} {right:.1f},{end[0]:.1f} "
        f"L{right:.1f},{end[1]:.1f} C{middle:.1f},{end[1]:.1f} {middle:.1f},{start[1]:.1f} {left:.1f},{start[1]:.1f} Z"
    )
    return Markup('<path class="band {}" d="{}"><title>{}</title></path>').format(css_class, path, title)
