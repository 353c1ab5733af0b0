"""Bytes that a cache policy should hold, from its definition and page size alone.

Deliberately no use of the allocator's or the policies' code: `kvcache.py` sets this beside what the
allocator counted. Rows lie in pages of 16, so every run of rows is rounded up to whole pages; constants are
16-bit floats.
"""

from __future__ import annotations

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
    return round(float(text[:-1]) / 100 * prompt) if text.endswith("%") else int(budget)


def _h2o(o: Any, text: Text) -> tuple[float, float]:
    # A score and a position, 4 bytes each.
    return min(text.length, _budget(o.budget, text.prompt)), 8


def _of_the_prompt(o: Any, text: Text) -> tuple[float, float]:
    return min(text.prompt, _budget(o.budget, text.prompt)) + text.length - text.prompt, 0


_KEEP: dict[str, Callable[[Any, Text], tuple[float, float]]] = {
    "h2o": _h2o,
    "snapkv": _of_the_prompt,
    "expected_attention": _of_the_prompt,
    "adakv": _of_the_prompt,
}

# --- in which form: bytes of all heads with `rows` rows each


def _full(o: Any, text: Text, rows: float) -> float:
    return text.heads * paged(rows) * 2 * text.row


def _kivi(o: Any, text: Text, rows: float) -> float:
    """Keys packed `residual` at a time, of the values all but the latest `residual`."""
    if o.bits == 16:
        return _full(o, text, rows)
    keys, values = rows // o.residual * o.residual, max(0, rows - o.residual)
    code, d = o.bits / 8, text.config.head_dim
    packed_keys = keys * d * code + keys / o.group_size * d * 4
    packed_values = paged(values) * (d * code + d / o.group_size * 4)
    # A full page goes when its last row was packed.
    full_rows = paged(rows) - keys + paged(rows) - values // PAGE * PAGE
    return text.heads * (packed_keys + packed_values + full_rows * text.row)


_STORE: dict[str, Callable[[Any, Text, float], float]] = {"full": _full, "kivi": _kivi}

_PLACE = ("kcache",)

# --- policies that are all of it


def _streaming(o: Any, text: Text) -> float:
    recent = max(0, text.length - o.sinks)
    # Whole pages in front of what the next query sees are given back.
    gone = max(0, recent - o.window + 1) // PAGE * PAGE
    rows = paged(min(text.length, o.sinks)) + paged(recent) - gone
    return text.heads * rows * 2 * text.row


def _retrieval_heads(o: Any, text: Text) -> float | None:
    """Some heads keep all; of the others whole pages between sinks and window are given back."""
    if o.threshold is not None:
        return None
    whole = len(o.heads) or (max(1, round(o.keep * text.heads)) if o.keep else 0)
    gone = max(0, (text.length - o.window + 1) // PAGE * PAGE - paged(o.sinks))
    return (text.heads * paged(text.length) - (text.heads - whole) * gone) * 2 * text.row


def _rotatekv(o: Any, text: Text) -> float:
    """Every token coded at once, all heads of a layer together; the page under way is in full as well."""
    width = text.config.num_kv_heads * text.config.head_dim
    full = text.config.num_layers * 2 * width * text.item
    if o.bits == 16:
        return paged(text.length) * full
    coded = text.config.num_layers * 2 * (width * o.bits / 8 + width / o.group_size * 4)
    under_way = paged(text.length) - text.length // PAGE * PAGE
    return paged(text.length) * coded + under_way * full + text.kept * 2 * width * text.item


_ALONE: dict[str, Callable[[Any, Text], float | None]] = {
    "streaming": _streaming,
    "retrieval_heads": _retrieval_heads,
    "rotatekv": _rotatekv,
}


def analytic_bytes(cache: MethodChoice, text: Text) -> float | None:
    """Bytes that `text` should hold under `cache`; None where no formula is written here.

    Where rows lie changes nothing of how many bytes they are, so methods that place rows do not count.
    """
    if cache.name in _ALONE:
        return None if cache.then else _ALONE[cache.name](cache.options, text)
    rows, beside = float(text.length), 0.0
    store, options = _full, None
    for choice in cache.all:
        if choice.name in _KEEP:
            rows, beside = _KEEP[choice.name](choice.options, text)
        elif choice.name in _STORE:
            store, options = _STORE[choice.name], choice.options
        elif choice.name not in _PLACE:
            return None
    return store(options, text, rows) + text.heads * rows * beside
