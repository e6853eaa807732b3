"""Plain values → text that may stand inside a script."""

from __future__ import annotations

import json
from typing import Any


def as_script(value: Any) -> str:
    """JSON that is safe inside a script element and as JavaScript: no <, >, & and no line separators of Unicode."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
