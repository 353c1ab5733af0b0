"""What a request says of its tools, checked: the functions, and which of them may or must be called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trimtab.errors import RequestError, did_you_mean

MAX_TOOLS: Final = 128  # OpenAI's bound
_NAME: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_CHOICES: Final = ("none", "auto", "required")
_FIELDS: Final = ("name", "description", "parameters", "strict")


@dataclass(frozen=True)
class Function:
    """One function the model may call; `schema` is what its arguments must satisfy, always an object."""

    name: str
    schema: dict[str, Any]
    strict: bool = False
    description: str | None = None

    def shown(self) -> dict[str, Any]:
        """As the model is shown it; templates count on `parameters`."""
        about = {} if self.description is None else {"description": self.description}
        return {"type": "function", "function": {"name": self.name, **about, "parameters": self.schema}}


@dataclass(frozen=True)
class Choice:
    """`kind` is none, auto, required or named; `functions` are those that may be called."""

    kind: str
    functions: tuple[Function, ...]


def read_tools(tools: Any) -> tuple[Function, ...]:
    """The functions of a request's `tools`. Raises RequestError that names the tool and the field."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence) or not tools:
        raise RequestError("tools must be a list of at least one tool; leave it out where there is none")
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are possible")
    functions = tuple(_function(f"tools[{i}]", tool) for i, tool in enumerate(tools))
    seen: dict[str, int] = {}
    for i, function in enumerate(functions):
        if function.name in seen:
            first = seen[function.name]
            raise RequestError(
                f"tools[{i}] has the name {function.name!r} of tools[{first}]; every name must be its own"
            )
        seen[function.name] = i
    return functions


def read_choice(choice: Any, functions: tuple[Function, ...]) -> Choice:
    """What `tool_choice` asks for; None stands for auto where there are tools. Raises RequestError."""
    if choice is None:
        return Choice("auto" if functions else "none", functions)
    if choice == "none":
        return Choice("none", functions)
    if not functions:
        raise RequestError(f"tool_choice is {choice!r}, but the request has no tools; give tools as well")
    if isinstance(choice, str) and choice in _CHOICES:
        return Choice(choice, functions)
    if isinstance(choice, Mapping):
        name = _chosen_name(choice)
        found = [function for function in functions if function.name == name]
        if not found:
            known = [function.name for function in functions]
            raise RequestError(
                f"tool_choice names {name!r}, which is not in tools.{did_you_mean(name, known)}"
            )
        return Choice("named", tuple(found))
    raise RequestError(
        f"tool_choice is {choice!r}; it must be 'none', 'auto', 'required' or "
        '{"type": "function", "function": {"name": ...}}'
    )


def _chosen_name(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    if (
        choice.get("type") == "function"
        and isinstance(function, Mapping)
        and set(choice) == {"type", "function"}
    ):
        name = function.get("name")
        if isinstance(name, str) and set(function) == {"name"}:
            return name
    raise RequestError(
        f"tool_choice is {dict(choice)!r}; a chosen function is "
        '{"type": "function", "function": {"name": ...}}'
    )


def _function(where: str, tool: Any) -> Function:
    if not isinstance(tool, Mapping):
        raise RequestError(f"{where} is {tool!r}; it must be an object with type and function")
    if tool.get("type") != "function":
        raise RequestError(f"{where}.type is {tool.get('type')!r}; only 'function' is known")
    _no_others(where, tool, ("type", "function"))
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise RequestError(f"{where}.function is {function!r}; it must be an object with a name")
    where = f"{where}.function"
    _no_others(where, function, _FIELDS)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{where}.name is {name!r}; it must be 1 to 64 letters, digits, '_' or '-'")
    description, strict = function.get("description"), function.get("strict")
    if description is not None and not isinstance(description, str):
        raise RequestError(f"{where}.description is {description!r}; it must be a text")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(f"{where}.strict is {strict!r}; it must be true or false")
    return Function(name, _schema(where, name, function.get("parameters")), bool(strict), description)


def _no_others(where: str, found: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in found:
        if name not in known:
            raise RequestError(f"{where} has no field {name!r}.{did_you_mean(str(name), known)}")


def _schema(where: str, name: str, schema: Any) -> dict[str, Any]:
    """The schema of the arguments, which says that they are an object."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if schema is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{where}.parameters is {schema!r}; it must be a JSON schema, that is an object")
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(dict(schema))
    except SchemaError as error:
        at = "".join(f"[{part!r}]" for part in error.absolute_path)
        raise RequestError(
            f"{where}.parameters{at} of {name!r} is not a valid JSON schema: {error.message}"
        ) from None
    except RecursionError:
        raise RequestError(f"{where}.parameters of {name!r} is nested too deeply for a JSON schema") from None
    if schema.get("type", "object") != "object":
        raise RequestError(
            f"{where}.parameters of {name!r} has the type {schema['type']!r}; arguments are an 'object'"
        )
    return {"type": "object", **schema}
