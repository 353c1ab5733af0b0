"""Messages about tools as the chat template needs them: calls made before, their results, and the tools.

A template that knows tools gets `tool_calls` with arguments as objects (the convention of transformers) or
as text, whichever it prints as JSON. One that does not gets everything as ordinary text: calls in the
assistant's words, results in the user's, and the tools in the system's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer
from trimtab.serving.tools.definitions import Choice, Function
from trimtab.serving.tools.formats import ToolFormat

_PROBE_WORDS = "Answer in rhyme"


def with_native_calls(
    messages: Sequence[Mapping[str, Any]], form: ToolFormat, tokenizer: Tokenizer, source: str
) -> list[dict[str, Any]]:
    """For a template that knows tools. Raises RequestError for arguments that are not a JSON object."""
    out = [dict(message) for message in messages]
    with_calls = [(i, message) for i, message in enumerate(out) if message.get("tool_calls")]
    as_objects = bool(with_calls) and takes_objects(tokenizer, source)
    for i, message in with_calls:
        calls = []
        for j, call in enumerate(message["tool_calls"]):
            name, text = _name_and_arguments(f"messages[{i}].tool_calls[{j}]", call)
            value = _object(f"messages[{i}].tool_calls[{j}]", text) if as_objects else text
            calls.append({**call, "type": "function", "function": {"name": name, "arguments": value}})
        message["tool_calls"] = calls
    if form.short_ids:
        for message in out:
            if isinstance(message.get("tool_call_id"), str):
                message["tool_call_id"] = _short(message["tool_call_id"])
            for call in message.get("tool_calls") or ():
                if isinstance(call.get("id"), str):
                    call["id"] = _short(call["id"])
    return out


def with_written_calls(messages: Sequence[Mapping[str, Any]], form: ToolFormat) -> list[dict[str, Any]]:
    """For a template that knows nothing of tools: calls and results as text, roles in turn."""
    out: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    after_results = False
    for i, given in enumerate(messages):
        message = {key: value for key, value in given.items() if key not in ("tool_calls", "tool_call_id")}
        calls = given.get("tool_calls")
        if calls:
            written = []
            for j, call in enumerate(calls):
                where = f"messages[{i}].tool_calls[{j}]"
                name, text = _name_and_arguments(where, call)
                names[str(call.get("id"))] = name
                written.append((name, text or "{}"))
            message["content"] = appended(message.get("content"), write_calls(written, form), "\n")
        is_result = given.get("role") == "tool"
        if is_result:
            result = {
                "name": names.get(str(given.get("tool_call_id"))),
                "content": _text(given.get("content")),
            }
            words = json.dumps({k: v for k, v in result.items() if v is not None}, ensure_ascii=False)
            message = {"role": "user", "content": f"<tool_response>\n{words}\n</tool_response>"}
        # Results of one turn, and what the user says with them, are one message: many templates take turns.
        if after_results and message.get("role") == "user":
            before = out.pop()["content"]
            message["content"] = prepended(message.get("content"), before, "\n")
        after_results = message.get("role") == "user" and (is_result or after_results)
        out.append(message)
    return out


def write_calls(calls: Sequence[tuple[str, str]], form: ToolFormat) -> str:
    """Calls (name and JSON text of the arguments) as the format has them."""
    objects = [f'{{"name": {json.dumps(n)}, "{form.arguments_key}": {a}}}' for n, a in calls]
    if form.trigger in form.between:
        return "\n".join("\n".join((*form.opening, call, *form.closing)) for call in objects)
    joined = f"{''.join(form.between)} ".join(objects)
    return joined if form.bare else f"{''.join(form.opening)}{joined}{''.join(form.closing)}"


def system_text(functions: Sequence[Function], choice: Choice, parallel: bool, form: ToolFormat) -> str:
    """What a model is told of its tools where its template cannot tell it."""
    listed = "\n".join(json.dumps(function.shown(), ensure_ascii=False) for function in functions)
    example = write_calls([("function_name", '{"argument": "value"}')], form)
    many = {
        "auto": "You may call functions, or answer without.",
        "required": "Call at least one function now.",
        "named": f"Call the function {choice.functions[0].name} now.",
    }[choice.kind]
    if not parallel:
        many += " Call no more than one."
    return (
        f"These functions can be called, one a line, with the JSON schema of their arguments:\n{listed}\n"
        f"A call is written like this:\n{example}\n"
        f"The result comes between <tool_response> and </tool_response>. {many}"
    )


def with_system_text(
    messages: Sequence[Mapping[str, Any]], text: str, tokenizer: Tokenizer, source: str
) -> list[dict[str, Any]]:
    """The text joined to the system's message; to the first user's where the template has no system's."""
    out = [dict(message) for message in messages]
    if not takes_system(tokenizer, source):
        for message in out:
            if message.get("role") == "user":
                message["content"] = prepended(message.get("content"), text, "\n\n")
                return out
        return [{"role": "user", "content": text}, *out]
    if out and out[0].get("role") in ("system", "developer"):
        out[0]["content"] = appended(out[0].get("content"), text, "\n\n")
        return out
    return [{"role": "system", "content": text}, *out]


def takes_system(tokenizer: Tokenizer, source: str) -> bool:
    """Whether the template prints a system message; some refuse it, some drop it."""
    chat = [{"role": "system", "content": _PROBE_WORDS}, {"role": "user", "content": "Hello"}]
    return _PROBE_WORDS in _rendered(tokenizer, source, chat)


def takes_objects(tokenizer: Tokenizer, source: str) -> bool:
    """Whether the template makes JSON of arguments that are objects; else it wants their text."""
    function = {"name": "probe", "arguments": {"key": "value"}}
    call = {"id": "a1b2c3d4e", "type": "function", "function": function}
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    if re.search(r'(?<!\\)"key"', _rendered(tokenizer, source, chat)):
        return True
    function["arguments"] = '{"key": "value"}'
    return not re.search(r'(?<!\\)"key"', _rendered(tokenizer, source, chat))


def appended(content: Any, text: str, between: str) -> Any:
    """Content (a text, a list of parts, or none) with a text behind it."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": f"{between}{text}" if content else text}]
    return f"{content}{between}{text}" if content else text


def prepended(content: Any, text: Any, between: str) -> Any:
    """Content with other content before it."""
    if isinstance(content, list) or isinstance(text, list):
        parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
        return [
            *parts,
            *(content if isinstance(content, list) else [{"type": "text", "text": content or ""}]),
        ]
    return f"{text}{between}{content}" if content else text


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content or ""}]


def _rendered(tokenizer: Tokenizer, source: str, chat: Sequence[Mapping[str, Any]]) -> str:
    try:
        return tokenizer.apply_chat_template(chat, chat_template=source)
    except RequestError:
        return ""


def _name_and_arguments(where: str, call: Any) -> tuple[str, str]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} is {call!r}; it must have a function with a name and arguments")
    arguments = function.get("arguments", "")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise RequestError(
            f"{where}.function.arguments is {arguments!r}; it must be the JSON text of an object"
        )
    return function["name"], arguments


def _object(where: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{where}.function.arguments is not valid JSON ({error}); the chat template needs an object, "
            "so mend it or leave that message out"
        ) from None
    if not isinstance(value, dict):
        raise RequestError(f"{where}.function.arguments is {text!r}; it must be the JSON text of an object")
    return value


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _short(call_id: str) -> str:
    """An id as it is where it has nine letters or digits; else nine that stand for it."""
    if re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]
