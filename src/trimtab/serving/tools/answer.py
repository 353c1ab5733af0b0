"""What an answer with tool calls consists of, whole and in pieces."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Delta:
    """A piece of the answer: content, or of call `index` the beginning (id and name) or more arguments."""

    content: str = ""
    index: int | None = None
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def to_openai(self) -> dict[str, Any]:
        """As in `choices[].delta` of a chunk."""
        if self.index is None:
            return {"content": self.content}
        call: dict[str, Any] = {"index": self.index}
        if self.name is not None:
            call |= {"id": self.id, "type": "function"}
            call["function"] = {"name": self.name, "arguments": self.arguments}
        else:
            call["function"] = {"arguments": self.arguments}
        return {"tool_calls": [call]}


@dataclass
class ToolCall:
    """One call; `arguments` is JSON text, cut off where `complete` is False."""

    id: str
    name: str
    arguments: str = ""
    complete: bool = False

    def to_openai(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Parsed:
    """A whole answer. `deltas` are those that were still held back when the text ended."""

    content: str | None
    tool_calls: list[ToolCall]
    finish_reason: str | None
    deltas: list[Delta] = field(default_factory=list)
