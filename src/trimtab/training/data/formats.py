"""What a record becomes: plain text, a chat, a prompt with its completion, a text with a label.

All fields of a format are settings that its token stores depend on. `columns` are those that it needs of a
record, none where that depends on the record; `read` raises BadRecord or ConfigError for a record that is
not of its kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trimtab.errors import ConfigError
from trimtab.models.tokenizer import Tokenizer
from trimtab.training.data.chat_format import TrainOn, mark_conversation
from trimtab.training.data.encoding import Marked
from trimtab.training.data.records import BadRecord, alpaca_prompt, conversation, take, take_text
from trimtab.training.data.segments import Segment

TooLong = Literal["drop", "cut_left", "cut_right"]


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Running text in the column `text`; `last` (the tokenizer's end token, say) closes a document."""

    text: str = "text"
    last: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def read(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> Marked:
        text = take_text(values, self.text, "text")
        if not text:
            raise BadRecord(f"{self.text!r} is an empty text")
        return Marked(text, last=self.last)


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """Conversations through the chat template; see `records.conversation` for the layouts."""

    messages: str | None = None
    train_on: TrainOn = "answers"

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def read(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> Marked:
        return mark_conversation(tokenizer, conversation(values, self.messages), self.train_on)


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """A prompt and what is to follow it, without a chat template; Alpaca records get Alpaca's prompt."""

    prompt: str = "prompt"
    completion: str = "completion"
    train_on: Literal["answers", "all"] = "answers"
    first: int | None = None
    last: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def read(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> Marked:
        if self.prompt not in values and "instruction" in values and "output" in values:
            prompt, completion = alpaca_prompt(values), take_text(values, "output", "completion")
        else:
            prompt = take_text(values, self.prompt, "prompt")
            completion = take_text(values, self.completion, "completion")
        if not completion:
            raise BadRecord(f"{self.completion!r} is an empty text")
        text = prompt + completion
        spans = None if self.train_on == "all" else ((len(prompt), len(text)),)
        return Marked(text, spans, self.first, self.last)


@dataclass(frozen=True, slots=True)
class LabelledFormat:
    """A text and its class: a number, or one of the names in `labels`."""

    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] = ()
    first: int | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text, self.label)

    def read(self, values: Mapping[str, Any], tokenizer: Tokenizer) -> Marked:
        text = take_text(values, self.text, "text")
        if not text:
            raise BadRecord(f"{self.text!r} is an empty text")
        return Marked(text, first=self.first, label=self._class(take(values, self.label, "label")))

    def _class(self, found: Any) -> int:
        if isinstance(found, str) and found in self.labels:
            return self.labels.index(found)
        if isinstance(found, int) and 0 <= found < (len(self.labels) or found + 1):
            return int(found)
        known = f"one of {', '.join(self.labels)}" if self.labels else "a number from 0 up"
        raise BadRecord(f"{self.label!r} is {found!r} and not {known}; list all classes in 'labels'")


Format = TextFormat | ChatFormat | CompletionFormat | LabelledFormat


def fit(segment: Segment, max_tokens: int | None, too_long: TooLong, first: int | None) -> Segment | None:
    """`segment` if it has at most `max_tokens`, else nothing, its end (`cut_left`) or its beginning.

    The token `first` stays at the beginning either way. A cut that leaves nothing to learn gives nothing.
    """
    if max_tokens is None or len(segment) <= max_tokens:
        return segment
    if too_long == "drop":
        return None
    kept = np.arange(max_tokens)
    if too_long == "cut_left":
        kept += len(segment) - max_tokens
        if segment.tokens[0] == first:
            kept[0] = 0
    cut = Segment(segment.tokens[kept], segment.trained[kept], segment.label)
    return cut if np.any(cut.trained[1:]) else None


def check_max_tokens(max_tokens: int | None) -> None:
    """Raises ConfigError for a length that leaves nothing to predict."""
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"'max_tokens' is {max_tokens}; a text to learn from has at least 2 tokens")
