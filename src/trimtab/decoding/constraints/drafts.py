"""Which draft of JSON schema a schema is written in, whether it is a valid one, and where its parts lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from jsonschema import exceptions, validators
from jsonschema.protocols import Validator
from jsonschema_specifications import REGISTRY
from referencing import Registry, Resource
from referencing.exceptions import NoSuchResource, Unresolvable
from referencing.jsonschema import specification_with

from trimtab.errors import RequestError

MAX_DEPTH = 100
MAX_PARTS = 50_000
DRAFTS: dict[str, type[Validator]] = {
    "https://json-schema.org/draft/2020-12/schema": validators.Draft202012Validator,
    "https://json-schema.org/draft/2019-09/schema": validators.Draft201909Validator,
    "http://json-schema.org/draft-07/schema": validators.Draft7Validator,
    "http://json-schema.org/draft-06/schema": validators.Draft6Validator,
    "http://json-schema.org/draft-04/schema": validators.Draft4Validator,
}
NEWEST = "https://json-schema.org/draft/2020-12/schema"
# Drafts in which nothing beside a `$ref` counts.
REF_ALONE = frozenset(uri for uri in DRAFTS if "/draft-0" in uri)

ONE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedItems",
    "unevaluatedProperties",
)
MANY = ("allOf", "anyOf", "items", "oneOf", "prefixItems")
NAMED = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")


def children(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(keyword, schema) of the schemas right below one."""
    for key, value in schema.items():
        if key in ONE and isinstance(value, dict | bool):
            yield key, value
        elif key in MANY and isinstance(value, list):
            yield from ((key, part) for part in value)
        elif key in NAMED and isinstance(value, dict):
            yield from ((key, part) for part in value.values() if isinstance(part, dict | bool))


def every(schema: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas below it, booleans left out."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
            waiting.extend(child for _, child in children(part))


def check_size(schema: Any) -> None:
    """Raise RequestError for schemas so deep or large that reading them could hang or fail."""
    waiting, count = [(schema, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise RequestError(f"the JSON schema is nested more than {MAX_DEPTH} levels deep; use $ref")
        if count > MAX_PARTS:
            raise RequestError(f"the JSON schema has more than {MAX_PARTS:,} parts; use a smaller one")
        below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting.extend((part, depth + 1) for part in below)


def draft_of(schema: dict[str, Any]) -> str:
    """The URI of the schema's draft, in which it is valid. Raises RequestError that names the keyword."""
    named = schema.get("$schema")
    if named is None or not isinstance(named, str):
        tried = list(DRAFTS)  # without a name, the newest in which it is valid
    else:
        uri = named.removesuffix("#").replace(
            "https://json-schema.org/draft-0", "http://json-schema.org/draft-0"
        )
        if "/draft-03/" in uri:
            raise RequestError(f"$schema {named!r} is not supported; write the schema in draft 4 or newer")
        tried = [uri if uri in DRAFTS else NEWEST]
    first = None
    for uri in tried:
        problem = _problem(schema, uri)
        if problem is None:
            return uri
        first = first or problem
    assert first is not None
    keyword = next((str(part) for part in reversed(first.absolute_path) if isinstance(part, str)), "schema")
    where = "/".join(str(part) for part in first.absolute_path) or "its root"
    raise RequestError(f"the JSON schema is invalid at {where} ({keyword}): {shortened(first.message)}")


def _problem(schema: dict[str, Any], uri: str) -> exceptions.ValidationError | None:
    # Formats of the schema itself (patterns among them) are judged by what has to read them.
    validator = DRAFTS[uri](_meta_schema(uri))
    return None if validator.is_valid(schema) else exceptions.best_match(validator.iter_errors(schema))


@cache
def _meta_schema(uri: str) -> Mapping[str, Any]:
    """The schema of schemas; from 2019 on with its parts put into one, which is checked faster."""
    whole = DRAFTS[uri].META_SCHEMA
    if "allOf" not in whole:
        return whole
    flat: dict[str, Any] = {"type": ["object", "boolean"], "properties": {}, "$defs": {}}
    base = uri.removesuffix("schema")
    for part in [*(REGISTRY.contents(base + below["$ref"]) for below in whole["allOf"]), whole]:
        flat["properties"] |= part.get("properties", {})
        flat["$defs"] |= part.get("$defs", {})

    def closed(value: Any) -> Any:
        if isinstance(value, list):
            return [closed(below) for below in value]
        if not isinstance(value, dict):
            return value
        if isinstance(value.get("$dynamicRef", value.get("$recursiveRef")), str):
            return {"$ref": "#"}
        # References to a definition of another part, "meta/validation#/$defs/stringArray".
        return {
            key: "#" + below.partition("#")[2] if key == "$ref" and isinstance(below, str) else closed(below)
            for key, below in value.items()
        }

    return closed(flat)


def check_references(schema: dict[str, Any], uri: str) -> Registry:
    """A registry in which every reference of the schema is found; nothing is ever fetched.

    Raises RequestError that names the reference which is not.
    """
    specification = specification_with(uri)
    root: Resource[Any] = Resource(contents=schema, specification=specification)
    try:
        registry: Registry = REGISTRY.with_resource(root.id() or "", root).crawl()
    except ValueError as error:
        raise RequestError(f"$id in the JSON schema is not a URI: {error}") from None
    seen: set[int] = set()
    waiting: list[tuple[Any, Any]] = [(schema, registry.resolver_with_root(root))]
    while waiting:
        part, resolver = waiting.pop()
        if id(part) in seen or not isinstance(part, dict):
            continue
        seen.add(id(part))
        if part is not schema:
            resolver = resolver.in_subresource(Resource(contents=part, specification=specification))
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            reference = part.get(keyword)
            if keyword not in part:
                continue
            if not isinstance(reference, str):
                raise RequestError(f"{keyword} is {reference!r}; it must be a text")
            try:
                found = resolver.lookup(reference)
            except (Unresolvable, NoSuchResource, ValueError):
                raise RequestError(
                    f"{keyword} {reference!r} leads nowhere within the schema, and remote schemas are never "
                    "fetched; put what it means under $defs"
                ) from None
            if not isinstance(found.contents, dict | bool):
                raise RequestError(f"{keyword} {reference!r} leads to something that is not a schema")
            if not reference.startswith(tuple(DRAFTS)):
                waiting.append((found.contents, found.resolver))
        waiting.extend((child, resolver) for _, child in children(part))
    return registry


def shortened(text: str, most: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."
