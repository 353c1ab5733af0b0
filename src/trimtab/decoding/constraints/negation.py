"""What a JSON schema does not allow, as a schema without `not`, where that can be said."""

from __future__ import annotations

from typing import Any

TYPES = ("null", "boolean", "number", "string", "array", "object")
# Keywords that say nothing about which values are valid.
TRIVIAL = frozenset(
    ("$comment", "title", "description", "default", "example", "examples")
    + ("deprecated", "readOnly", "writeOnly")
)
_OPPOSITE = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
}
_BOUNDS = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}


def negated(schema: Any, uri: str) -> Any | None:
    """A schema of exactly the values that `schema` does not allow; None where no rule knows one.

    `uri`: the draft, since bounds and references mean other things in old ones.
    """
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict) or "$ref" in schema:
        return None
    branches = []
    for keyword, value in schema.items():
        if keyword in TRIVIAL:
            continue
        other = _one(keyword, value, uri)
        if other is None:
            return None
        branches.append(other)
    if not branches:
        return False
    return branches[0] if len(branches) == 1 else {"anyOf": branches}


def _one(keyword: str, value: Any, uri: str) -> Any | None:
    """The opposite of one keyword, which passes all values of types that it is not about."""
    if keyword == "not":
        return value
    if keyword == "type":
        return _type(value)
    if keyword == "required" and isinstance(value, list) and value:
        missing = [{"type": "object", "properties": {name: False}} for name in value]
        return missing[0] if len(missing) == 1 else {"anyOf": missing}
    if keyword in ("anyOf", "allOf") and isinstance(value, list):
        others = [negated(part, uri) for part in value]
        if any(other is None for other in others):
            return None
        return {"allOf" if keyword == "anyOf" else "anyOf": others}
    if keyword == "properties" and isinstance(value, dict):
        others = {name: negated(part, uri) for name, part in value.items()}
        if any(other is None for other in others.values()):
            return None
        present = [
            {"type": "object", "required": [name], "properties": {name: other}}
            for name, other in others.items()
            if other is not False
        ]
        return {"anyOf": present} if present else False
    if keyword in ("const", "enum"):
        return _values([value] if keyword == "const" else value)
    if keyword in _OPPOSITE and isinstance(value, int) and not isinstance(value, bool):
        kind, opposite, step = _OPPOSITE[keyword]
        return {"type": kind, opposite: value + step} if value + step >= 0 else False
    if keyword in _BOUNDS and "draft-04" not in uri and isinstance(value, int | float):
        return {"type": "number", _BOUNDS[keyword]: value}
    return None


def _type(value: Any) -> Any | None:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or ("integer" in names and "number" not in names):
        return None  # numbers that are not whole have no type of their own
    others = [name for name in TYPES if name not in names]
    return {"type": others} if others else False


def _values(values: Any) -> Any | None:
    """All but some values, if these are true, false and null."""
    if not isinstance(values, list) or not all(v is None or isinstance(v, bool) for v in values):
        return None
    others: list[Any] = [v for v in (None, True, False) if not any(v is known for known in values)]
    rest: dict[str, Any] = {"type": [name for name in TYPES if name not in ("null", "boolean")]}
    return {"anyOf": [rest, {"enum": others}]} if others else rest
