"""Marked texts to segments of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.segments import Segment, all_trained


@dataclass(frozen=True, slots=True)
class Marked:
    """A text and the characters of it that are to be learnt.

    Attributes:
        spans: (begin, end) in characters, in order; None means all of the text.
        first, last: token ids to put before and after it. `last` is learnt, `first` never is.
        label: a class for classification.
    """

    text: str
    spans: tuple[tuple[int, int], ...] | None = None
    first: int | None = None
    last: int | None = None
    label: int | None = None


def encode(tokenizer: Tokenizer, texts: Sequence[Marked]) -> list[Segment]:
    """The segments of `texts`, tokenized together, which uses all cores."""
    if all(t.spans is None for t in texts):
        encoded = tokenizer.backend.encode_batch_fast([t.text for t in texts], add_special_tokens=False)
    else:
        encoded = tokenizer.backend.encode_batch([t.text for t in texts], add_special_tokens=False)
    return [_segment(t, e) for t, e in zip(texts, encoded, strict=True)]


def _segment(text: Marked, encoded: Any) -> Segment:
    """`encoded` is a `tokenizers.Encoding`."""
    segment = all_trained(np.array(encoded.ids, dtype=np.int64))
    if text.spans is not None:
        segment = Segment(segment.tokens, _marks(text, encoded.offsets))
    tokens, trained = segment.tokens, segment.trained
    if text.first is not None:
        tokens, trained = np.append(text.first, tokens), np.append(False, trained)
    if text.last is not None:
        tokens, trained = np.append(tokens, text.last), np.append(trained, True)
    return Segment(tokens, trained, text.label)


def _marks(text: Marked, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Which tokens begin inside a span."""
    assert text.spans is not None
    if not offsets:
        return np.zeros(0, dtype=bool)
    begins, ends = np.array(offsets, dtype=np.int64).T
    # Some tokenizers leave spaces out of offsets, so a token of spaces only is empty and lies before its end.
    begins = np.where(ends > begins, begins, begins - 1)
    edges = np.array(text.spans, dtype=np.int64).reshape(-1, 2)
    span = np.searchsorted(edges[:, 0], begins, side="right") - 1
    inside = span >= 0
    inside[inside] = begins[inside] < edges[span[inside], 1]
    return inside
