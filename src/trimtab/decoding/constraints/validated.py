"""Full validation of finished JSON texts, for schemas whose mask allows more than they do.

`jsonschema` does it, with the meaning of `pattern` and `format` that masks have, exact decimal arithmetic and
a bound on the work: a hostile schema must not hold up the texts of others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from fractions import Fraction
from threading import local
from typing import Any

from jsonschema import FormatChecker, exceptions, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from trimtab.decoding.constraints import formats
from trimtab.decoding.constraints.drafts import DRAFTS, every, shortened
from trimtab.decoding.constraints.patterns import pattern
from trimtab.errors import RequestError

MAX_WORK = 50_000  # keywords looked at for one text, some tenths of a second

_work = local()


class _TooMuch(Exception):
    pass


class Validation:
    """What checks a finished text against one schema; the schema must be valid and its references known.

    Raises RequestError for patterns that cannot be kept.
    """

    def __init__(self, schema: dict[str, Any], uri: str, registry: Registry) -> None:
        for part in every(schema):
            named = part.get("patternProperties")
            for text in named if isinstance(named, dict) else ():
                pattern(text, "patternProperties")
            if isinstance(part.get("pattern"), str):
                pattern(part["pattern"])
        keywords = {key for part in every(schema) for key in part}
        if {"unevaluatedProperties", "patternProperties"} <= keywords:
            # jsonschema matches these patterns by `re`, which can take forever.
            raise RequestError("unevaluatedProperties and patternProperties together are not supported")
        self._validator = _class(uri)(schema, registry=registry, format_checker=_format_checker())

    def __call__(self, text: str) -> str | None:
        """Why `text` is not valid, in one sentence; None if it is."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            return f"the text is not valid JSON: {shortened(str(error))}"
        _work.left = MAX_WORK
        try:
            error = next(self._validator.iter_errors(value), None)
        except _TooMuch:
            return "the text takes too much work to validate against the schema"
        except (RecursionError, Unresolvable) as problem:
            return f"the text cannot be validated against the schema: {type(problem).__name__}"
        if error is None:
            return None
        return (
            f"the text breaks the schema at {error.json_path} ({error.validator}): {shortened(error.message)}"
        )


def _format_checker() -> FormatChecker:
    checker = FormatChecker(formats=())
    for name in formats.ENFORCED:
        form = formats.form(name)
        checker.checkers = {
            **checker.checkers,
            name: (lambda value, form=form: not isinstance(value, str) or form.matches(value), ()),
        }
    return checker


def _class(uri: str) -> Any:
    """The draft's validator with our patterns and arithmetic, and every keyword counted."""
    if uri not in _CLASSES:
        base = DRAFTS[uri]
        own: dict[str, Any] = {
            "pattern": _pattern,
            "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
            "multipleOf": _multiple_of,
        }
        keywords = {name: _counted(own.get(name, check)) for name, check in base.VALIDATORS.items()}
        _CLASSES[uri] = validators.extend(base, keywords)
    return _CLASSES[uri]


_CLASSES: dict[str, Any] = {}


def _counted(check: Any) -> Any:
    def counted(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        _work.left -= 1
        if _work.left < 0:
            raise _TooMuch
        yield from check(validator, value, instance, schema) or ()

    return counted


def _pattern(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, str) and not pattern(value).search(instance):
        yield exceptions.ValidationError(f"{instance!r} does not match {value!r}")


def _pattern_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, dict):
        for text, below in value.items():
            for name, part in instance.items():
                if pattern(text, "patternProperties").search(name):
                    yield from validator.descend(part, below, path=name, schema_path=text)


def _additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if not isinstance(instance, dict):
        return
    known = schema.get("properties", {})
    patterns = [pattern(text, "patternProperties") for text in schema.get("patternProperties", {})]
    for name, part in instance.items():
        if name in known or any(p.search(name) for p in patterns):
            continue
        if value is False:
            yield exceptions.ValidationError(f"property {name!r} is not allowed")
        elif isinstance(value, dict):
            yield from validator.descend(part, value, path=name)


def _multiple_of(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
    if isinstance(instance, bool) or not isinstance(instance, int | float):
        return
    if re.search("inf|nan", repr(instance)) or Fraction(repr(instance)) % Fraction(repr(value)):
        yield exceptions.ValidationError(f"{instance!r} is not a multiple of {value}")
