"""Numbers as people read them, and as JSON can say them."""

from __future__ import annotations

import math
from typing import Any

from trimtab.sizes import format_bytes


def format_number(value: float | None, unit: str = "", *, signed: bool = False) -> str:
    """A number with three significant digits or so and its unit; a dash for what is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit == "B":
        return format_bytes(value)
    if unit == "share":
        return (f"{100 * value:+.0f}%" if signed else f"{100 * value:.0f}%").replace("-", "−")
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{_digits(1000 * value)} ms"
    text = _digits(value)
    if signed and value > 0:
        text = f"+{text}"
    return text.replace("-", "−")


def _digits(value: float) -> str:
    """Three significant digits, thousands apart, no exponent below a million."""
    size = abs(value)
    if size >= 1e6:
        return f"{value:.2e}"
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}"


def finite(value: Any) -> Any:
    """`value` with every number that JSON cannot say replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
