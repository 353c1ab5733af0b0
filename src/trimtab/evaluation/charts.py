"""The report's pictures as plain SVG text. Colours come from the page's style sheet through classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from trimtab.evaluation.labels import Box, place, text_width
from trimtab.pages.axes import Scale, scale_for

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 48
FONT = 12
LONGEST_LABEL = 34


@dataclass(frozen=True, slots=True)
class Point:
    """A plan in a picture; `y_error` is a standard error, or None."""

    label: str
    x: float
    y: float
    y_error: float | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows and which direction is better."""

    title: str
    unit: str
    better: Literal["higher", "lower"]


def pareto(points: Sequence[Point], x: Axis, y: Axis) -> list[bool]:
    """For each point whether no other is at least as good on both axes and better on one."""

    def gain(better: str, ours: float, theirs: float) -> float:
        return ours - theirs if better == "higher" else theirs - ours

    def beaten(p: Point) -> bool:
        return any(
            min(gx := gain(x.better, q.x, p.x), gy := gain(y.better, q.y, p.y)) >= 0 and max(gx, gy) > 0
            for q in points
        )

    return [not beaten(p) for p in points]


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Plans as labelled points, the Pareto front joined by steps, standard errors as whiskers."""
    xs = scale_for([p.x for p in points], x.unit, zero=True)
    spread = [v for p in points for v in (p.y - (p.y_error or 0.0), p.y + (p.y_error or 0.0)) if v > 0]
    ys = scale_for(spread or [p.y for p in points], y.unit)
    plot = Box(LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    dots = [_dot(p.x, p.y, xs, ys, plot) for p in points]
    front = pareto(points, x, y)
    steps = _steps([d for d, on in zip(dots, front, strict=True) if on], x, y, plot)
    parts = [_frame(xs, ys, plot, x, y), _reach(steps, x, y, plot)]
    whiskers = [_whisker(p, d, ys, plot) for p, d in zip(points, dots, strict=True)]
    parts += [_line("whisker", w.centre[0], w.top, w.centre[0], w.bottom) for w in whiskers if w is not None]
    marks = [*(w for w in whiskers if w is not None), *(Box(a - 6, b - 6, a + 6, b + 6) for a, b in dots)]
    hint, hint_box = _better_corner(x, y, plot, marks)
    parts.append(hint)
    obstacles = [hint_box, *(w for w in whiskers if w is not None)]
    lines = [Box(min(a, c), min(b, d), max(a, c), max(b, d)) for (a, b), (c, d) in pairwise(steps)]
    parts += _labels(points, dots, front, plot, obstacles, lines)
    parts += [
        f'<circle class="{"dot front" if f else "dot"}" cx="{_n(cx)}" cy="{_n(cy)}" r="5">'
        f"<title>{escape(p.label)}: {escape(xs.tick_text(p.x))}, {escape(ys.tick_text(p.y))}</title></circle>"
        for p, (cx, cy), f in zip(points, dots, front, strict=True)
    ]
    return _svg(WIDTH, HEIGHT, f"{y.title} against {x.title}", parts)


def _n(value: float) -> str:
    return f"{value:.1f}"


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )


def _dot(x: float, y: float, xs: Scale, ys: Scale, plot: Box) -> tuple[float, float]:
    return (
        plot.left + xs.place(x) * (plot.right - plot.left),
        plot.bottom - ys.place(y) * (plot.bottom - plot.top),
    )


def _whisker(point: Point, dot: tuple[float, float], ys: Scale, plot: Box) -> Box | None:
    if not point.y_error:
        return None
    low, high = max(point.y - point.y_error, ys.low), min(point.y + point.y_error, ys.high)
    top, bottom = (plot.bottom - ys.place(v) * (plot.bottom - plot.top) for v in (high, low))
    return Box(dot[0] - 1, top, dot[0] + 1, bottom)


def _frame(xs: Scale, ys: Scale, plot: Box, x: Axis, y: Axis) -> str:
    parts = []
    for tick in ys.ticks:
        at = _dot(xs.low, tick, xs, ys, plot)[1]
        parts.append(_line("grid", plot.left, at, plot.right, at))
        parts.append(_text(plot.left - 8, at + 4, ys.tick_text(tick), "tick", "end"))
    for tick in xs.ticks:
        at = _dot(tick, ys.low, xs, ys, plot)[0]
        parts.append(_line("grid", at, plot.top, at, plot.bottom))
        parts.append(_text(at, plot.bottom + 18, xs.tick_text(tick), "tick", "middle"))
    log_x, log_y = (", logarithmic" if s.log else "" for s in (xs, ys))
    parts.append(_text((plot.left + plot.right) / 2, HEIGHT - 10, x.title + log_x, "axis", "middle"))
    middle = (plot.top + plot.bottom) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {_n(middle)}) rotate(-90)">'
        f"{escape(y.title + log_y)}</text>"
    )
    return "".join(parts)


def _line(cls: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{cls}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _text(x: float, y: float, text: str, cls: str, anchor: str) -> str:
    return f'<text class="{cls}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(text)}</text>'


def _worst(x: Axis, y: Axis, plot: Box) -> tuple[float, float]:
    """The corner where everything is worst."""
    return (
        plot.left if x.better == "higher" else plot.right,
        plot.bottom if y.better == "higher" else plot.top,
    )


def _steps(front: Sequence[tuple[float, float]], x: Axis, y: Axis, plot: Box) -> list[tuple[float, float]]:
    """The border of what is reachable: from one worse end through the dots of the front to the other."""
    ends = sorted(front)
    worst_x, worst_y = _worst(x, y, plot)
    path: list[tuple[float, float]] = []
    if x.better == "higher":
        path.append((worst_x, ends[0][1]))
        for here, after in pairwise(ends):
            path += [here, (here[0], after[1])]
        path += [ends[-1], (ends[-1][0], worst_y)]
    else:
        path += [(ends[0][0], worst_y), ends[0]]
        for here, after in pairwise(ends):
            path += [(after[0], here[1]), after]
        path.append((worst_x, ends[-1][1]))
    return path


def _reach(steps: Sequence[tuple[float, float]], x: Axis, y: Axis, plot: Box) -> str:
    line = " ".join(f"{_n(a)},{_n(b)}" for a, b in steps)
    corner = ",".join(_n(v) for v in _worst(x, y, plot))
    return f'<polygon class="reach" points="{line} {corner}"/><polyline class="front" points="{line}"/>'


def _better_corner(x: Axis, y: Axis, plot: Box, marks: Sequence[Box]) -> tuple[str, Box]:
    """The word "better" with an arrow by the corner where everything is best, and the room it takes."""
    right, up = x.better == "higher", y.better == "higher"
    arrow = {(True, True): "↗", (True, False): "↘", (False, True): "↖", (False, False): "↙"}[right, up]
    words = f"better {arrow}" if right else f"{arrow} better"
    width = text_width(words, 11.5)
    baseline = plot.top + 17 if up else plot.bottom - 9
    for step in range(max(1, int((plot.right - plot.left - width) / 12))):
        left = plot.right - width - 8 - 12 * step if right else plot.left + 8 + 12 * step
        box = Box(left - 2, baseline - 13, left + width + 2, baseline + 5)
        if not any(box.overlaps(mark) for mark in marks):
            break
    return _text(left + width if right else left, baseline, words, "hint", "end" if right else "start"), box


def _labels(
    points: Sequence[Point],
    dots: Sequence[tuple[float, float]],
    front: Sequence[bool],
    plot: Box,
    obstacles: Sequence[Box],
    lines: Sequence[Box],
) -> list[str]:
    names = [p.label if len(p.label) <= LONGEST_LABEL else p.label[: LONGEST_LABEL - 1] + "…" for p in points]
    sizes = [(text_width(name, FONT), FONT * 1.25) for name in names]
    order = sorted(range(len(points)), key=lambda i: not front[i])
    placed = place([dots[i] for i in order], [sizes[i] for i in order], plot, obstacles, lines)
    parts = []
    for i, spot in zip(order, placed, strict=True):
        if spot is None:
            continue
        (cx, cy), box = dots[i], spot.box
        if spot.needs_leader:
            ex = min(max(cx, box.left), box.right)
            ey = min(max(cy, box.top), box.bottom)
            parts.append(_line("leader", cx, cy, ex, ey))
        # The text's estimated width is an upper bound: keep it at the end of the box that faces the dot.
        if box.left >= cx:
            at, anchor = box.left, "start"
        elif box.right <= cx:
            at, anchor = box.right, "end"
        else:
            at, anchor = box.centre[0], "middle"
        cls = "name front" if front[i] else "name"
        parts.append(_text(at, box.bottom - FONT * 0.32, names[i], cls, anchor))
    return parts


CELL_WIDTH, CELL_HEIGHT = 54, 30
HEAT_LEFT, HEAT_BOTTOM = 44, 22
DARK_FROM = 0.72  # from this share on the cell is so strong that its text must be light


def heat_map(
    values: Sequence[Sequence[float]], columns: Sequence[str], rows: Sequence[str], title: str
) -> str:
    """Shares 0..1 as cells, `values[row][column]`, each with its number."""
    width = HEAT_LEFT + CELL_WIDTH * len(columns)
    height = CELL_HEIGHT * len(rows) + HEAT_BOTTOM
    parts = []
    for r, (name, line) in enumerate(zip(rows, values, strict=True)):
        top = r * CELL_HEIGHT
        parts.append(_text(HEAT_LEFT - 8, top + CELL_HEIGHT / 2 + 4, name, "tick", "end"))
        for c, share in enumerate(line):
            left = HEAT_LEFT + c * CELL_WIDTH
            parts.append(
                f'<rect class="cell" x="{left + 1}" y="{top + 1}" width="{CELL_WIDTH - 2}" '
                f'height="{CELL_HEIGHT - 2}" rx="3" fill-opacity="{0.07 + 0.93 * share:.2f}"/>'
            )
            cls = "cell-text strong" if share >= DARK_FROM else "cell-text"
            middle, baseline = left + CELL_WIDTH / 2, top + CELL_HEIGHT / 2 + 4.5
            parts.append(_text(middle, baseline, f"{100 * share:.0f}", cls, "middle"))
    for c, name in enumerate(columns):
        parts.append(_text(HEAT_LEFT + (c + 0.5) * CELL_WIDTH, height - 5, name, "tick", "middle"))
    return _svg(width, height, title, parts)
