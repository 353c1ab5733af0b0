"""Bytes that a cache policy should hold, from its definition and page size alone.

Deliberately no use of the allocator's or the policies' code: `kvcache.py` sets this beside what the
allocator counted. Rows lie in pages of 16, so every run of rows is rounded up to whole pages; constants are
16-bit floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.models.config import ModelConfig
from trimtab.plan import MethodChoice

PAGE = 16


@dataclass(frozen=True, slots=True)
class Text:
    """A text with `length` rows, of which the first `prompt` are its prompt."""

    prompt: int
    length: int
    config: ModelConfig
    item: int  # bytes of a number in full
    kept: int = 0  # tokens that a policy keeps in full by their content, summed over layers

    @property
    def heads(self) -> int:
        return self.config.num_layers * self.config.num_kv_heads

    @property
    def row(self) -> int:
        """Bytes of K or V (one of them) of a token in one head, in full."""
        return self.config.head_dim * self.item


def paged(rows: float) -> float:
    return -(-rows // PAGE) * PAGE


# --- which rows stay: rows of a head, and bytes beside each row


def _budget(budget: Any, prompt: int) -> int:
    """Rows that `budget` means for a prompt: a count, or a share such as `25%`."""
    text = str(budget)
    return int(prompt * float(text[:-1]) / 100) if text.endswith("%") else int(budget)


def _h2o(o: Any, text: Text) -> tuple[float, float]:
    # A score and a position, 4 bytes each, for every row of a page.
    return min(text.length, _budget(o.budget, text.prompt)), 8


def _of_the_prompt(o: Any, text: Text) -> tuple[float, float]:
    return min(text.prompt, _budget(o.budget, text.prompt)) + text.length - text.prompt, 0


_KEEP: dict[str, Callable[[Any, Text], tuple[float, float]]] = {
    "h2o": _h2o,
    "snapkv": _of_the_prompt,
    "expected_attention": _of_the_prompt,
    "adakv": _of_the_prompt,
}

# --- in which form: bytes of keys and of values of all heads with `rows` rows each


def _full(o: Any, text: Text, rows: float) -> tuple[float, float]:
    half = text.heads * paged(rows) * text.row
    return half, half


def _kivi(o: Any, text: Text, rows: float) -> tuple[float, float]:
    """Keys packed `residual` at a time, of the values all but the latest `residual`."""
    if o.bits == 16:
        return _full(o, text, rows)
    keys, values = rows // o.residual * o.residual, max(0, rows - o.residual)
    code, d = o.bits / 8, text.config.head_dim
    packed_keys = keys * d * code + keys / o.group_size * d * 4
    packed_values = paged(values) * (d * code + d / o.group_size * 4)
    # A full page goes when its last row was packed.
    full_keys, full_values = paged(rows) - keys, paged(rows) - values // PAGE * PAGE
    return (
        text.heads * (packed_keys + full_keys * text.row),
        text.heads * (packed_values + full_values * text.row),
    )


_STORE: dict[str, Callable[[Any, Text, float], tuple[float, float]]] = {"full": _full, "kivi": _kivi}

# --- where: bytes of keys and values that stay on the device


def _kcache(o: Any, text: Text, keys: float, values: float) -> float:
    """Values are in host memory, but for those of the first layers where that is asked for."""
    return keys + values * o.full_layers / text.config.num_layers


_PLACE: dict[str, Callable[[Any, Text, float, float], float]] = {"kcache": _kcache}

# --- policies that are all of it


def _gone(o: Any, text: Text) -> float:
    """Rows of whole pages between the sinks and what the next query sees of its window."""
    return max(0, (text.length + 1 - o.window) // PAGE * PAGE - paged(o.sinks))


def _streaming(o: Any, text: Text) -> float:
    return text.heads * (paged(text.length) - _gone(o, text)) * 2 * text.row


def _retrieval_heads(o: Any, text: Text) -> float | None:
    """Some heads keep all, the others stream."""
    if o.threshold is not None:
        return None
    whole = len(o.heads) or (max(1, round(o.keep * text.heads)) if o.keep else 0)
    return (text.heads * paged(text.length) - (text.heads - whole) * _gone(o, text)) * 2 * text.row


def _coded_at_once(text: Text, bits: int, constants: Callable[[int], float]) -> float:
    """Every token coded when it is there, all heads of a layer together; the page under way is in full as
    well. `constants(width)`: bytes beside the codes of K and V of a token in one layer."""
    c = text.config
    width = c.num_kv_heads * c.head_dim
    full = 2 * width * text.item
    if bits == 16:
        return c.num_layers * paged(text.length) * full
    coded = 2 * width * bits / 8 + constants(width)
    under_way = paged(text.length) - text.length // PAGE * PAGE
    return c.num_layers * (paged(text.length) * coded + under_way * full) + text.kept * full


def _rotatekv(o: Any, text: Text) -> float:
    return _coded_at_once(text, o.bits, lambda width: 2 * width / o.group_size * 4)


def _kvquant(o: Any, text: Text) -> float:
    """A key's outliers have a place for each expected one and `headroom`, and two counts of a byte; a value
    has as many at either end, and two constants. An outlier is a number and its channel of two bytes. What
    16 tokens take is rounded up to 64ths of what they take in full, themselves whole 32 bytes."""

    def constants(width: int) -> float:
        keys = o.outliers * o.headroom * width * (text.item + 2) + 2
        side = math.ceil(o.outliers * width / 2)
        codes, part = 2 * width * o.bits / 8, math.ceil(width * text.item / 64) * 32
        unit = PAGE * (codes + keys + 2 * side * (text.item + 2) + 4)
        return math.ceil(unit / part) * part / PAGE - codes

    return _coded_at_once(text, o.bits, constants)


_ALONE: dict[str, Callable[[Any, Text], float | None]] = {
    "streaming": _streaming,
    "retrieval_heads": _retrieval_heads,
    "rotatekv": _rotatekv,
    "kvquant": _kvquant,
}


def analytic_bytes(cache: MethodChoice, text: Text) -> float | None:
    """Bytes that `text` should hold on the device under `cache`; None where no formula is written here."""
    if cache.name in _ALONE:
        return None if cache.then else _ALONE[cache.name](cache.options, text)
    known = _KEEP | _STORE | _PLACE
    if any(choice.name not in known for choice in cache.all):
        return None
    parts = {choice.name: choice.options for choice in cache.all}
    rows, beside = float(text.length), 0.0
    for name in parts.keys() & _KEEP.keys():
        rows, beside = _KEEP[name](parts[name], text)
    keys, values = _full(None, text, rows)
    if cache.name == "adakv":
        if parts.keys() & _STORE.keys():
            return None
        # Heads differ in their rows, so the end of a head's last page is half empty on average.
        keys = values = text.heads * (rows + (PAGE - 1) / 2) * text.row
    for name in parts.keys() & _STORE.keys():
        keys, values = _STORE[name](parts[name], text, rows)
    held = keys + values
    for name in parts.keys() & _PLACE.keys():
        held = _PLACE[name](parts[name], text, keys, values)
    return held + text.heads * paged(rows) * beside
