"""Where to write names beside the points of a picture, so that nothing covers anything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

# Advance widths of a wide sans-serif at size 1, rounded up: real fonts are narrower, so what is apart
# here is apart on the page.
_NARROW, _WIDE = set("iljtfrI.,:;'|!()[] -1"), set("mwMW@%")


def text_width(text: str, size: float) -> float:
    """An upper estimate of the width of `text` in a sans-serif font of `size`."""
    return size * sum(0.42 if c in _NARROW else 0.92 if c in _WIDE else 0.64 for c in text)


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-parallel rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def inside(self, other: Box) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )

    @property
    def centre(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(frozen=True, slots=True)
class Placed:
    """A label's box, and whether it is so far from its point that a line must lead to it."""

    box: Box
    needs_leader: bool


def place(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    obstacles: Sequence[Box] = (),
    lines: Sequence[Box] = (),
    gap: float = 9,
) -> list[Placed | None]:
    """A place inside `area` for a label of each size (width, height) near its point.

    Places never overlap each other, an obstacle or any point's dot; None where no room is left. They stay
    clear of `lines` too where that is possible right beside the dot.
    """
    dots = [Box(x - gap + 2, y - gap + 2, x + gap - 2, y + gap - 2) for x, y in points]
    taken = [*obstacles, *dots]
    found: list[Placed | None] = []
    for (x, y), size in zip(points, sizes, strict=True):
        free = (
            Placed(box, far)
            for box, far in _candidates(x, y, *size, gap, area)
            if box.inside(area) and not any(box.overlaps(t) for t in taken)
        )
        first = next(free, None)
        near = [first] if first is not None else []
        near += takewhile(lambda spot: not spot.needs_leader, free)
        clear = [spot for spot in near if not any(spot.box.overlaps(line) for line in lines)]
        chosen = next(iter([*clear, *near]), None)
        if chosen is not None:
            taken.append(chosen.box)
        found.append(chosen)
    return found


def _candidates(
    x: float, y: float, width: float, height: float, gap: float, area: Box
) -> Iterator[tuple[Box, bool]]:
    """Places by preference: beside the dot, then around it, then ever farther out."""

    def at(cx: float, cy: float) -> Box:
        return Box(cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)

    for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
        near = gap if 0 in (dx, dy) else gap * 0.6
        yield at(x + dx * (near + width / 2), y + dy * (near + height / 2)), False
    reach = math.hypot(area.right - area.left, area.bottom - area.top)
    distance = 2.2 * gap
    while distance < reach:
        for step in range(24):
            angle = math.tau * step / 24
            cx = x + math.cos(angle) * (distance + width / 2)
            cy = y + math.sin(angle) * (distance + height / 2)
            yield at(cx, cy), True
        distance += 0.7 * gap
