"""A request's body, from bytes to its model; every mistake in it is one sentence that names the field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.errors import did_you_mean
from trimtab.serving.errors import ApiError
from trimtab.serving.fields import shown

Model = TypeVar("Model", bound=BaseModel)

# Fields that other servers or older clients know, and what to write instead.
_INSTEAD = {
    "guided_json": "structured_outputs: {json: ...}",
    "guided_regex": "structured_outputs: {regex: ...}",
    "guided_choice": "structured_outputs: {choice: [...]}",
    "guided_grammar": "structured_outputs: {grammar: ...}",
    "whitespace_pattern": "structured_outputs: {disable_any_whitespace: true}",
    "max_new_tokens": "max_tokens",
    "stop_sequences": "stop",
    "functions": "tools",
    "function_call": "tool_choice",
    "reasoning_effort": "chat_template_kwargs, if the model's template knows it",
}
_KINDS = {
    "string_type": "a text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
    "int_from_float": "a whole number",
}


def parse(model: type[Model], body: bytes) -> Model:
    """The request that `body` holds. Raises ApiError 400."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False)
        # An unknown field says most about what went wrong.
        first = next((d for d in details if d["type"] == "extra_forbidden"), details[0])
        raise _refusal(first, model) from None


def _refusal(detail: ErrorDetails, model: type[BaseModel]) -> ApiError:
    kind, context = detail["type"], detail.get("ctx", {})
    path = _path(detail["loc"])
    if kind == "json_invalid":
        reason = str(context.get("error", "")) or detail["msg"]
        return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
    if not path:
        if kind == "refused":
            return ApiError(400, f"the request {context['sentence'].strip()}")
        return ApiError(400, "the body must be a JSON object")
    name = str(detail["loc"][-1])
    if kind == "extra_forbidden":
        return ApiError(400, _unknown(path, name, model), param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter")
    return ApiError(400, f"{path}{_reason(detail, context, name)}", param=path, code="invalid_value")


def _unknown(path: str, name: str, model: type[BaseModel]) -> str:
    if name in _INSTEAD:
        return f"{path} is not a field of this server; use {_INSTEAD[name]}"
    if path != name:
        return f"{path} is not a field that this server knows; leave it out"
    hint = did_you_mean(name[:100], model.model_fields)
    return f"{shown(path)} is not a field of this request;{hint if '?' in hint else ' leave it out'}".replace(
        "; Did", ". Did"
    )


def _reason(detail: ErrorDetails, context: dict[str, Any], name: str) -> str:
    """How the sentence goes on after the field's path."""
    kind = detail["type"]
    if kind == "refused":
        sentence = context["sentence"]
        if name in _INSTEAD:
            return f" is not supported by this server; use {_INSTEAD[name]}"
        return sentence if sentence.startswith((" ", "[")) else f" {sentence}"
    value = shown(detail["input"])
    if kind == "finite_number":
        return f" is {value}; it must be a finite number"
    if kind in _KINDS:
        return f" is {value}; it must be {_KINDS[kind]}"
    if kind == "literal_error":
        return f" is {value}; it must be {context['expected'].replace('False', 'false')}"
    if name == "suffix":
        return " is not supported by this server; leave it out"
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in bounds:
        words = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
        key = bounds[kind]
        return f" is {value}; it must be {words[key]} {context[key]}"
    if kind in ("too_long", "string_too_long"):
        return f" is too long; at most {context['max_length']} are taken"
    if kind in ("too_short", "string_too_short"):
        return f" is empty; give at least {context['min_length']}"
    if kind == "string_pattern_mismatch":
        return f" is {value}; it must match {context['pattern']}"
    message = re.sub(r"^(Input|Value|String) should ", "it should ", detail["msg"])
    return f" is {value}; {message}"


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part}" if path else str(part)
    return path[:200]
