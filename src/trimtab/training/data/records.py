"""The record layouts that others use: chats of several makes, prompt and completion, Alpaca."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.training.data.chat_format import Conversation

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
_ALPACA = (
    "Below is an instruction that describes a task{more}. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


class BadRecord(ValueError):
    """What is wrong with one record."""


def take(values: Mapping[str, Any], column: str, setting: str) -> Any:
    """The value of a column; BadRecord says which columns there are and which setting names it."""
    if values.get(column) is None:
        there = ", ".join(repr(name) for name, value in values.items() if value is not None) or "nothing"
        raise BadRecord(f"no {column!r} (there is {there}); set {setting!r} to the right column")
    return values[column]


def take_text(values: Mapping[str, Any], column: str, setting: str) -> str:
    """The text of a column, which is Unicode that can be tokenized."""
    text = take(values, column, setting)
    if not isinstance(text, str):
        raise BadRecord(f"{column!r} is a {type(text).__name__} and no text")
    return check_unicode(text, column)


def check_unicode(text: str, what: str) -> str:
    """`text`, if it holds no halves of surrogate pairs, which JSON can write and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{what!r} is not valid Unicode (it holds half a surrogate pair)") from None
    return text


def conversation(values: Mapping[str, Any], column: str | None = None) -> Conversation:
    """A chat record of any known layout, told by its columns:

    - `messages`: dicts with `role` and `content` (`column` gives this list another name);
    - `conversations`: dicts with `from` and `value` (ShareGPT), with an optional `system` column;
    - `prompt` and `completion`, two lists of messages or two texts;
    - `instruction`, `input` and `output`, optionally `system` and `history` (Alpaca).

    `tools` is passed to the chat template.
    """
    tools = values.get("tools") or None
    name = column or next((n for n in ("messages", "conversations") if values.get(n) is not None), None)
    if name is not None:
        return Conversation(_system(values) + _messages(take(values, name, "messages"), name), tools)
    if values.get("prompt") is not None:
        prompt = _turns(take(values, "prompt", "prompt"), "user", "prompt")
        answer = _turns(take(values, "completion", "completion"), "assistant", "completion")
        return Conversation(prompt + answer, tools, prompt=len(prompt))
    if values.get("instruction") is not None:
        return Conversation(_system(values) + _alpaca_messages(values), tools)
    return Conversation(_messages(take(values, "messages", "messages"), "messages"), tools)


def alpaca_prompt(values: Mapping[str, Any]) -> str:
    """The prompt of Stanford Alpaca (Taori et al. 2023) for models without a chat template."""
    instruction = take_text(values, "instruction", "prompt")
    more = values.get("input") or ""
    return _ALPACA.format(
        more=", paired with an input that provides further context" if more else "",
        instruction=instruction,
        input=f"### Input:\n{more}\n\n" if more else "",
    )


def _system(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = values.get("system")
    return [{"role": "system", "content": system}] if system else []


def _messages(found: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise BadRecord(f"{name!r} is no list of messages")
    return [_message(each, name) for each in found]


def _message(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise BadRecord(f"{name!r} holds a {type(found).__name__} where a message should be")
    message = dict(found)
    if "role" not in message and "from" in message:
        message = {"role": message["from"], "content": message.get("value")}
        if message["role"] not in _ROLES:
            raise BadRecord(f"{name!r} has the unknown role {message['role']!r}")
        message["role"] = _ROLES[message["role"]]
    if not isinstance(message.get("role"), str):
        raise BadRecord(f"a message of {name!r} has no 'role'")
    content = message.get("content")
    if isinstance(content, str):
        check_unicode(content, name)
    elif content is None and not message.get("tool_calls"):
        raise BadRecord(f"a message of {name!r} has no 'content'")
    return message


def _turns(found: Any, role: str, name: str) -> list[dict[str, Any]]:
    if isinstance(found, str):
        return [{"role": role, "content": check_unicode(found, name)}]
    return _messages(found, name)


def _alpaca_messages(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for asked, answered in values.get("history") or []:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    question = take_text(values, "instruction", "messages")
    if values.get("input"):
        question = f"{question}\n{take_text(values, 'input', 'messages')}"
    answer = take_text(values, "output", "messages")
    return [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
