"""JSON schemas said in other words: the same meaning, in keywords that llguidance can keep exactly.

Each rule is an equivalence, so a rewritten schema may stand for the original in any rung of the ladder. What
no rule covers stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trimtab.decoding.constraints import formats
from trimtab.decoding.constraints.drafts import MANY, NAMED, ONE, REF_ALONE, every
from trimtab.decoding.constraints.negation import TRIVIAL, TYPES, negated
from trimtab.decoding.constraints.patterns import parts, pattern

Part = dict[str, Any]
MOST_BRANCHES = 6  # alternatives multiply in the grammar
LIMITS = ["maxItems", "minItems", "maxLength", "minLength", "maxProperties", "minProperties"]
IN_PLACE = frozenset(
    ("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if")
    + ("dependentSchemas", "dependencies")
)


class Rewriter:
    """Rewrites schemas of one draft.

    Attributes:
        split_one_of: also turn `oneOf` into `anyOf` of branches that exclude each other. llguidance can prove
            many to be so already, and what is added makes others too large.
        ignored: formats that are not enforced.
        narrowed: formats of which only the part in ASCII is allowed.
        repeats: a property written twice could count twice, so finished texts have to be checked.
    """

    def __init__(self, uri: str, split_one_of: bool) -> None:
        self.split_one_of = split_one_of
        self._rules = _RULES
        self.ignored: set[str] = set()
        self.narrowed: set[str] = set()
        self.repeats = False
        self._uri = uri

    def whole(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A rewritten copy of a whole schema."""
        if any(_counts_on_siblings(part) for part in every(schema)):
            # Most rules name properties, which `unevaluatedProperties` would take for evaluated ones.
            self._rules = (_whole_limits, _formats, _patterns)
        return self(schema)

    def __call__(self, schema: Any) -> Any:
        """A rewritten copy of a part of the schema and all below it."""
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema and self._uri in REF_ALONE:
            kept = ("$ref", "$schema", "$id", "id", "definitions", "$defs")
            schema = {key: schema[key] for key in kept if key in schema}
        part = {key: self._below(key, value) for key, value in schema.items()}
        for rule in self._rules:
            rule(self, part)
        return part

    def _below(self, key: str, value: Any) -> Any:
        if key in ONE and isinstance(value, dict):
            return self(value)
        if key in MANY and isinstance(value, list):
            return [self(below) for below in value]
        if key in NAMED and isinstance(value, dict):
            return {name: self(below) for name, below in value.items()}
        return value


def _counts_on_siblings(part: Part) -> bool:
    asks = {"unevaluatedProperties", "unevaluatedItems"} & part.keys()
    return bool(asks) and not all(part[key] is True for key in asks) and bool(IN_PLACE & part.keys())


def _add(part: Part, *more: Any) -> None:
    """Ask for more on top; at the end, so that references to places in `allOf` stay right."""
    part["allOf"] = [*part.get("allOf", ()), *more]


def _formats(self: Rewriter, part: Part) -> None:
    name = part.get("format")
    if not isinstance(name, str):
        return
    meaning = formats.as_schema(name)
    if name in formats.NARROWED:
        self.narrowed.add(name)
    if meaning is None:
        self.ignored.add(name)
        del part["format"]
    elif "format" in meaning:
        part["format"] = meaning["format"]
    else:
        del part["format"]
        if meaning.keys() & part.keys():
            _add(part, meaning)
        else:
            part.update(meaning)


def _patterns(self: Rewriter, part: Part) -> None:
    if isinstance(part.get("pattern"), str) and part["pattern"] not in formats.PATTERNS.values():
        found = parts(part.pop("pattern"))
        for wanted, text in found:
            if wanted and "pattern" not in part:
                part["pattern"] = text
            else:
                _add(part, {"pattern": text} if wanted else {"not": {"pattern": text}})
    named = part.get("patternProperties")
    if isinstance(named, dict):
        both = {text: parts(text) for text in named}
        part["patternProperties"] = {
            both[text][0].pattern if len(both[text]) == 1 and both[text][0].wanted else text: below
            for text, below in named.items()
        }


def _whole_limits(self: Rewriter, part: Part) -> None:
    for name in LIMITS:
        if isinstance(part.get(name), float) and part[name].is_integer():
            part[name] = int(part[name])


def _property_names(self: Rewriter, part: Part) -> None:
    names = part.get("propertyNames")
    if names is True or (isinstance(names, dict) and not names.keys() - TRIVIAL):
        del part["propertyNames"]
        return
    if not isinstance(names, dict) or part.get("patternProperties"):
        return
    asked = {key: value for key, value in names.items() if key not in TRIVIAL}
    if asked.get("type") == "string":
        del asked["type"]
    others = part.get("additionalProperties", True)
    known = part.get("properties", {})
    if asked.keys() == {"pattern"} and (not known or others is True):
        allowed: Callable[[str], bool] = pattern(asked["pattern"], "propertyNames").search
        part["patternProperties"] = {asked["pattern"]: others}
        more: Part = {}
    elif asked.keys() == {"enum"} and isinstance(asked["enum"], list):
        texts = [text for text in asked["enum"] if isinstance(text, str)]
        allowed, more = texts.__contains__, dict.fromkeys(texts, others)
    else:
        return
    del part["propertyNames"]
    part["properties"] = {
        **more,
        **{name: below if allowed(name) else False for name, below in known.items()},
    }
    part["additionalProperties"] = False


def _unevaluated(self: Rewriter, part: Part) -> None:
    alone = not IN_PLACE & part.keys()
    rest = part.get("unevaluatedProperties")
    if rest is True or (rest is not None and alone):
        del part["unevaluatedProperties"]
        if rest is not True:
            part.setdefault("additionalProperties", rest)
    rest = part.get("unevaluatedItems")
    if rest is True or (rest is not None and alone and "contains" not in part and "2020-12" in self._uri):
        del part["unevaluatedItems"]
        if rest is not True:
            part.setdefault("items", rest)


def _dependents(self: Rewriter, part: Part) -> None:
    asked: list[tuple[str, Part]] = []
    for key in ("dependencies", "dependentRequired", "dependentSchemas"):
        for name, wanted in (part.get(key) or {}).items() if isinstance(part.get(key), dict) else ():
            wanted = [wanted] if isinstance(wanted, str) else wanted
            if isinstance(wanted, list):
                asked.append((name, {"required": list(dict.fromkeys([*wanted, name]))}))
            else:
                asked.append((name, {"required": [name], "allOf": [wanted]}))
    if len(asked) <= MOST_BRANCHES:
        for key in ("dependencies", "dependentRequired", "dependentSchemas"):
            part.pop(key, None)
        for name, wanted in asked:
            _add(part, {"anyOf": [{"properties": {name: False}}, wanted]})


def _conditions(self: Rewriter, part: Part) -> None:
    if "if" not in part or not ("then" in part or "else" in part):
        for key in ("if", "then", "else"):
            part.pop(key, None)
        return
    condition, other = part["if"], negated(part["if"], self._uri)
    if other is None:
        return
    branches = [
        {"allOf": [condition, part.get("then", True)]},
        {"allOf": [other, part.get("else", True)]},
    ]
    for key in ("if", "then", "else"):
        part.pop(key, None)
    _add(part, {"anyOf": branches})


def _nots(self: Rewriter, part: Part) -> None:
    if "not" in part:
        other = negated(part["not"], self._uri)
        if other is not None:
            del part["not"]
            _add(part, other)


def _one_of(self: Rewriter, part: Part) -> None:
    branches = part.get("oneOf")
    if not isinstance(branches, list):
        return
    if len(branches) == 1:
        _add(part, part.pop("oneOf")[0])
        return
    if not self.split_one_of or not 1 < len(branches) <= MOST_BRANCHES:
        return
    others = [negated(branch, self._uri) for branch in branches]
    if any(other is None for other in others):
        return
    del part["oneOf"]
    split = [
        {"allOf": [branch, *(other for j, other in enumerate(others) if j != i)]}
        for i, branch in enumerate(branches)
    ]
    _add(part, {"anyOf": split})


def _counts(self: Rewriter, part: Part) -> None:
    if part.get("uniqueItems") is False or part.get("maxItems") in (0, 1):
        part.pop("uniqueItems", None)
    least = part.get("minProperties")
    required = part.get("required")
    if isinstance(least, int) and isinstance(required, list) and least <= len(set(required)):
        del part["minProperties"]
    elif least == 1 and _names_all(part) and len(part["properties"]) <= MOST_BRANCHES:
        del part["minProperties"]
        _add(part, {"anyOf": [{"type": [*TYPES[:-1]]}, *({"required": [n]} for n in part["properties"])]})
    elif isinstance(least, int) and least > 1:
        self.repeats = True


def _names_all(part: Part) -> bool:
    """Whether no properties are allowed but those that are named."""
    named = part.get("properties")
    return (
        isinstance(named, dict)
        and part.get("additionalProperties") is False
        and not part.get("patternProperties")
    )


_RULES: tuple[Callable[[Rewriter, Part], None], ...] = (
    _whole_limits,
    _unevaluated,  # before rules that name properties
    _property_names,
    _formats,
    _patterns,
    _dependents,
    _conditions,
    _nots,
    _one_of,
    _counts,
)


def without(schema: Any, *keywords: str) -> Any:
    """A wider schema: one without some keywords, wherever they are."""
    if isinstance(schema, list):
        return [without(part, *keywords) for part in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: part for key, part in schema.items() if key not in keywords}
    return {
        key: {name: without(part, *keywords) for name, part in value.items()}
        if key in NAMED and isinstance(value, dict)
        else without(value, *keywords)
        if key in ONE or key in MANY
        else value
        for key, value in kept.items()
    }
