"""Looking for markers in text that is still arriving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_SPACE: Final = " \t\r\n"


def spaces(text: str, at: int) -> int:
    """Where the white space that begins at `at` ends."""
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at


def match(text: str, parts: Sequence[str]) -> int | None:
    """Length of `parts` at the text's beginning, white space before each; 0: not there; None: not yet."""
    at = 0
    for part in parts:
        at = spaces(text, at)
        if not text.startswith(part, at):
            return None if part.startswith(text[at:]) else 0
        at += len(part)
    return at


def first(text: str, marks: Sequence[str]) -> tuple[int, str]:
    """Where the first of the marks begins, and which it is; an empty mark where there is none."""
    found = [(text.find(mark), mark) for mark in marks]
    return min(((at, mark) for at, mark in found if at >= 0), default=(len(text), ""))


def held_back(text: str, marks: Sequence[str]) -> int:
    """Length of the longest end of the text with which one of the marks may begin."""
    most = min(len(text), max(map(len, marks), default=1) - 1)
    return next((n for n in range(most, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
