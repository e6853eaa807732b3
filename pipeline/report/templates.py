"""Jinja2 templates of report/web, the filters that format figures in them, and the style sheet."""

from __future__ import annotations

import math
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

WEB = Path(__file__).parent / "web"


def environment() -> Environment:
    """Escapes all values that are no Markup; a name that a template uses and was not given is an error."""
    loaded = Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    loaded.filters |= {
        "figure": figure,
        "percent": percent,
        "stage": stage_name,
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
        "address_part": lambda text: quote(text, safe=""),
    }
    return loaded


def text(name: str) -> str:
    """A file of WEB."""
    return (WEB / name).read_text(encoding="utf-8")


def style() -> Markup:
    return Markup(text("page.css"))


def figure(value: float | None) -> str:
    """0.5231 → 0.523; a dash for None and NaN."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def percent(fraction: float | None) -> str:
    """0.5231 → 52.3 %; a dash for None and NaN."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.1f} %"


def stage_name(stage: str) -> str:
    """score_maps_val → score maps val; also for other names with underscores."""
    return stage.replace("_", " ")
