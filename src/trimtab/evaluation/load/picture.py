"""Latency and throughput against the offered rate, as plain SVG text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from trimtab.evaluation.labels import text_width
from trimtab.evaluation.report import format_number
from trimtab.pages.axes import Scale, scale_for

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 70, 62, 14, 46
FONT = 12
LEAST_APART = 14  # pixels between the names at the curves' ends

# For a file by itself; a page has these names in its own style sheet.
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
.paper { fill: #fffefb; } .grid { stroke: #e2dfd7; } .tick, .axis { fill: #5d6670; font-size: 11px; }
.heading { fill: #1d2329; font-size: 14px; font-weight: 600; }
.curve { fill: none; stroke-width: 2; } .end { font-size: 12px; font-weight: 600; }
.curve.c0 { stroke: #0a6177; } .curve.c1 { stroke: #8a7a2f; } .curve.c2 { stroke: #c2410c; }
.end.c0, circle.c0 { fill: #0a6177; } .end.c1, circle.c1 { fill: #8a7a2f; }
.end.c2, circle.c2 { fill: #c2410c; }
.bound { stroke: #5d6670; stroke-dasharray: 5 4; } .bound-text { fill: #5d6670; font-size: 11px; }
.bound-text, .end { stroke: #fffefb; stroke-width: 3; stroke-linejoin: round; paint-order: stroke; }
"""


@dataclass(frozen=True, slots=True)
class Curve:
    """Named points; a point without a value is left out."""

    name: str
    points: Sequence[tuple[float, float | None]]

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None]


def curves(
    lines: Sequence[Curve], x_title: str, y_title: str, unit: str, bound: tuple[str, float] | None = None
) -> str:
    """Curves over one x axis, the names at their ends; `bound` is a dashed line across, with its name too."""
    drawn = [line for line in lines if line.known]
    points = [point for line in drawn for point in line.known]
    if not points:
        return ""
    xs = scale_for([0.0, *(x for x, _ in points)], "", zero=True)
    heights = [y for _, y in points] + ([bound[1]] if bound else [])
    ys = (
        scale_for([y for y in heights if y > 0] or [1.0], unit)
        if unit == "s"
        else scale_for([0.0, *heights], unit, zero=True)
    )
    parts = [_frame(xs, ys, x_title, y_title)]
    ends: list[tuple[float, float, str, str]] = []
    if bound is not None:
        at = _y(bound[1], ys)
        parts.append(f'<line class="bound" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        ends.append((WIDTH - RIGHT + 4, at, bound[0], "bound-text"))
    for i, line in enumerate(drawn):
        path = " ".join(f"{_x(x, xs):.1f},{_y(y, ys):.1f}" for x, y in line.known)
        parts.append(f'<polyline class="curve c{i}" points="{path}"/>')
        parts += [
            f'<circle class="c{i}" cx="{_x(x, xs):.1f}" cy="{_y(y, ys):.1f}" r="3.2">'
            f"<title>{escape(line.name)} at {format_number(x)}: {escape(format_number(y, unit))}</title>"
            "</circle>"
            for x, y in line.known
        ]
        last_x, last_y = line.known[-1]
        ends.append((_x(last_x, xs) + 8, _y(last_y, ys), line.name, f"end c{i}"))
    parts += _names(ends)
    title = escape(f"{y_title} against {x_title}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def sheet(pictures: Sequence[tuple[str, str]], title: str) -> str:
    """Pictures with their headings, two in a row, as one SVG file with its own style."""
    head, gap = 26, 20
    rows = (len(pictures) + 1) // 2
    width, height = 2 * WIDTH + 3 * gap, rows * (HEIGHT + head + gap) + gap
    parts = [f"<style>{STYLE}</style>", f'<rect class="paper" width="{width}" height="{height}"/>']
    for i, (heading, svg) in enumerate(pictures):
        left = gap + i % 2 * (WIDTH + gap)
        top = gap + i // 2 * (HEIGHT + head + gap)
        parts.append(_text(left, top + 14, heading, "heading", "start"))
        parts.append(
            svg.replace("<svg ", f'<svg x="{left}" y="{top + head}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>\n'
    )


def _x(value: float, xs: Scale) -> float:
    return LEFT + xs.place(value) * (WIDTH - LEFT - RIGHT)


def _y(value: float, ys: Scale) -> float:
    return HEIGHT - BOTTOM - ys.place(max(value, ys.low)) * (HEIGHT - TOP - BOTTOM)


def _frame(xs: Scale, ys: Scale, x_title: str, y_title: str) -> str:
    parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in ys.ticks:
        at = _y(tick, ys)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(_text(LEFT - 8, at + 4, ys.tick_text(tick), "tick", "end"))
    for tick in xs.ticks:
        at = _x(tick, xs)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(_text(at, bottom + 18, xs.tick_text(tick), "tick", "middle"))
    log = ", logarithmic" if ys.log else ""
    parts.append(_text((LEFT + right) / 2, HEIGHT - 8, x_title, "axis", "middle"))
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(13 {middle:.1f}) rotate(-90)">'
        f"{escape(y_title + log)}</text>"
    )
    return "".join(parts)


def _names(ends: Sequence[tuple[float, float, str, str]]) -> list[str]:
    """Names (x, y, text, class) to the right of what they name, moved apart where they would meet."""
    parts, last = [], -LEAST_APART * 1.0
    for left, at, name, cls in sorted(ends, key=lambda end: end[1]):
        last = max(at, last + LEAST_APART)
        parts.append(_text(min(left, WIDTH - text_width(name, FONT)), last + 4, name, cls, "start"))
    return parts


def _text(x: float, y: float, text: str, cls: str, anchor: str) -> str:
    return f'<text class="{cls}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
