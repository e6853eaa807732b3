"""Number of classes → their colours in the page, as CSS colours."""

from __future__ import annotations

import colorsys

from pipeline.imaging import palette

# Okabe and Ito (2008), https://jfly.uni-koeln.de/color/, without black: distinguishable with any kind of colour blindness
SAFE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
SHADES = (1.0, 0.6, 1.4)  # lightness of the 1st, 2nd and 3rd seven: with more than 21 classes, colours repeat


def of_classes(count: int, name: str) -> list[str]:
    """#rrggbb of background and `count` classes; name is "voc" or "safe"."""
    if name == "voc":
        return ["#" + colour.tobytes().hex() for colour in palette.voc_palette()[: count + 1]]
    return ["#000000", *(_shade(SAFE[at % len(SAFE)], SHADES[at // len(SAFE) % len(SHADES)]) for at in range(count))]


def _shade(colour: str, factor: float) -> str:
    hue, light, saturation = colorsys.rgb_to_hls(*(part / 255 for part in bytes.fromhex(colour[1:])))
    shaded = colorsys.hls_to_rgb(hue, min(0.85, light * factor), saturation)
    return "#" + bytes(round(255 * part) for part in shaded).hex()
