"""Ends a streamed text at the first of its stop texts, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Iterable


class StopChecker:
    """Watches one text for stop texts.

    The stop text that is *completed* first wins; of several completed by the same character, the longest.
    So the result depends on the text alone, not on how it arrives.

    Args:
        stop_strings: texts that end the completion, none of them empty.
        include_in_output: whether the text that was met is emitted too.
    """

    __slots__ = ("_held", "_include", "_last", "_longest", "_matched", "_prefixes", "_stops")

    def __init__(self, stop_strings: Iterable[str] = (), include_in_output: bool = False) -> None:
        self._stops = tuple(stop_strings)
        assert "" not in self._stops
        self._include = include_in_output
        self._held = ""
        self._matched: str | None = None
        self._prefixes = frozenset(stop[:i] for stop in self._stops for i in range(1, len(stop)))
        # A text that ends in none of these characters cannot end in the beginning of a stop text.
        self._last = frozenset(prefix[-1] for prefix in self._prefixes)
        self._longest = max(map(len, self._prefixes), default=0)

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece; returns (what may be shown now, the stop text that was met or None).

        What could be the beginning of a stop text is held back. After a match nothing more comes.
        """
        if not self._stops:
            return text, None
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        end, matched = self._first_match(text)
        if matched is not None:
            self._held = ""
            self._matched = matched
            return text[: end if self._include else end - len(matched)], matched
        keep = self._beginning_of_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """What was held back, when the text has ended for another reason."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str | None]:
        best = (len(text) + 1, 0)
        matched = None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (at + len(stop), -len(stop)) < best:
                best = (at + len(stop), -len(stop))
                matched = stop
        return best[0], matched

    def _beginning_of_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop text."""
        if not text or text[-1] not in self._last:
            return 0
        for length in range(min(self._longest, len(text)), 0, -1):
            if text[-length:] in self._prefixes:
                return length
        return 0
