"""JSON instances with their keys in an order that a grammar allows, found by trying.

llguidance fixes the order of properties, files have their own. What is rejected in one order only says
nothing of what else the mask allows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llguidance import LLMatcher


class Search:
    """Bounds the tries, and knows the orders in which the schema's objects name their properties."""

    def __init__(self, schema: Any, tries: int, joined_last_first: bool) -> None:
        self.left = tries
        self.joined_last_first = joined_last_first
        self._orders: list[dict[str, int]] = []
        self._collect(schema)

    def rank(self, value: dict[str, Any]) -> dict[str, int]:
        """An order of the keys of `value`: that of the objects of the schema which name most of them."""
        ranked: list[str] = []
        left = set(value)
        while left:
            best = max(self._orders, key=lambda order: len(order.keys() & left), default={})
            found = sorted(left & best.keys(), key=best.__getitem__)
            if not found:
                break
            # Objects that are joined by allOf or $ref may come in either order.
            ranked = found + ranked if self.joined_last_first else ranked + found
            left -= best.keys()
        return {name: i for i, name in enumerate(ranked)}

    def _collect(self, schema: Any) -> None:
        if isinstance(schema, dict):
            names: list[str] = []
            for key in ("properties", "required"):
                if isinstance(schema.get(key), dict | list):
                    names += [name for name in schema[key] if isinstance(name, str)]
            if names:
                self._orders.append({name: i for i, name in enumerate(dict.fromkeys(names))})
            for part in schema.values():
                self._collect(part)
        elif isinstance(schema, list):
            for part in schema:
                self._collect(part)


def in_allowed_order(value: Any, matcher: LLMatcher, schema: Any, tries: int = 20_000) -> str | None:
    """A compact dump of `value` that `matcher` accepts, or None if none is found.

    `matcher`: over single bytes, at its beginning. Keys are tried in the schema's order first.
    """
    for joined_last_first in (False, True):
        for text, after in _write(value, matcher, Search(schema, tries, joined_last_first)):
            if after.is_accepting():
                return text
    return None


def _fed(matcher: LLMatcher, text: str) -> LLMatcher | None:
    data = list(text.encode())
    copied = matcher.deep_copy()
    return copied if copied.try_consume_tokens(data) == len(data) else None


def _write(value: Any, matcher: LLMatcher, search: Search) -> Iterator[tuple[str, LLMatcher]]:
    search.left -= 1
    if search.left < 0:
        return
    if isinstance(value, dict):
        yield from _members("{", dict(value), matcher, search)
    elif isinstance(value, list):
        yield from _items("[", value, 0, matcher, search)
    else:
        text = json.dumps(value, ensure_ascii=False)
        after = _fed(matcher, text)
        if after is not None:
            yield text, after


def _members(
    opening: str, left: dict[str, Any], matcher: LLMatcher, search: Search
) -> Iterator[tuple[str, LLMatcher]]:
    if not left:
        text = "{}" if opening == "{" else "}"
        after = _fed(matcher, text)
        if after is not None:
            yield text, after
        return
    order = search.rank(left)
    ahead = {key: _fed(matcher, _head(opening, key)) for key in left}
    for key in sorted(left, key=lambda name: order.get(name, len(order))):
        after_head = ahead[key]
        if after_head is None:
            continue
        others = {name: part for name, part in left.items() if name != key}
        # In a fixed order, what was possible and no longer is will never be again.
        near = [_head(",", name) for name in others if ahead[name] is not None]
        for text, after in _write(left[key], after_head, search):
            if any(_fed(after, head) is None for head in near):
                continue
            for rest, end in _members(",", others, after, search):
                yield _head(opening, key) + text + rest, end


def _head(opening: str, key: str) -> str:
    return opening + json.dumps(key, ensure_ascii=False) + ":"


def _items(
    opening: str, values: list[Any], at: int, matcher: LLMatcher, search: Search
) -> Iterator[tuple[str, LLMatcher]]:
    if at == len(values):
        text = "[]" if opening == "[" else "]"
        after = _fed(matcher, text)
        if after is not None:
            yield text, after
        return
    after_mark = _fed(matcher, opening)
    if after_mark is None:
        return
    for text, after in _write(values[at], after_mark, search):
        for rest, end in _items(",", values, at + 1, after, search):
            yield opening + text + rest, end
