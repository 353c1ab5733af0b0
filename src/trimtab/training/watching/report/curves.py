"""Curves over optimiser steps as plain SVG text. Colours come from the page's style sheet through classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

from trimtab.pages.axes import nice_step

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 26, 44
MOST_POINTS = 300  # of a curve; more steps are averaged
LEFT_OUT = 0.03  # share of the first steps that do not stretch the y axis: losses fall from far above

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """Values by step, in the page's colour number `colour`.

    `look`: a `line`; `dots`, for values that are taken seldom; or `faint`, a line without a name.
    """

    name: str
    points: Points
    look: Literal["line", "dots", "faint"] = "line"
    colour: int = 0


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means over equal stretches of steps, each at its last step."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def smoothed(points: Points, keep: float = 0.95) -> list[tuple[float, float]]:
    """Exponential means of the values so far, without a bias towards the first."""
    found, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
        found.append((x, total / weight))
    return found


def picture(curves: Sequence[Curve], title: str, from_zero: bool = False) -> str:
    """One SVG with all `curves` that have points, their names above it; empty where there are none."""
    drawn = [replace(c, points=thinned(c.points)) for c in curves if c.points]
    if not drawn:
        return ""
    last = max(x for c in drawn for x, _ in c.points)
    late = [y for c in drawn for x, y in c.points if x >= LEFT_OUT * last]
    low, high = _range(late, from_zero)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = x / last, (min(max(y, low), high) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _ticks(low, high):
        y = place(0, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 8, y + 4, _number(tick), "tick", "end"))
    for tick in _ticks(0, last):
        parts.append(_text(place(tick, low)[0], HEIGHT - BOTTOM + 18, _number(tick), "tick", "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, "step", "axis", "middle"))
    for curve in drawn:
        spots = [place(x, y) for x, y in curve.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        faint = " faint" if curve.look == "faint" else ""
        parts.append(f'<polyline class="curve c{curve.colour}{faint}" points="{path}"/>')
        if curve.look == "dots" or len(spots) == 1:
            parts += [f'<circle class="c{curve.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots]
    named = [c for c in drawn if c.look != "faint"]
    if len(named) > 1:
        parts += _key(named)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} by step" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = (0.0 if from_zero else min(values)), max(values)
    air = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (low if from_zero else low - air), high + air


def _ticks(low: float, high: float) -> list[float]:
    step = nice_step((high - low) / 5)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _key(curves: Sequence[Curve]) -> list[str]:
    """The curves' names above the picture, set from the right."""
    parts, right = [], float(WIDTH - RIGHT)
    for curve in reversed(curves):
        parts.append(_text(right, TOP - 10, curve.name, f"end c{curve.colour}", "end"))
        right -= 7.0 * len(curve.name) + 16
    return parts


def _text(x: float, y: float, text: str, cls: str, anchor: str) -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
