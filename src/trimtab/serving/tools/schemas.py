"""A tool's schema as a part of a grammar, as exact as the ladder for JSON schemas makes it."""

from __future__ import annotations

import json
import re
from functools import cache, lru_cache
from typing import Any, NamedTuple

from trimtab.errors import RequestError
from trimtab.serving.tools.definitions import Function


class Inline(NamedTuple):
    """`text`: what stands behind `%json`; `left`: the keywords it does not keep, none where it is exact."""

    text: str
    left: str
    notes: tuple[str, ...]


def inline(function: Function) -> Inline:
    """The arguments' schema for a grammar. Raises RequestError that names the tool for what has no mask."""
    try:
        return _inline(json.dumps(function.schema))
    except RequestError as error:
        raise RequestError(f"the parameters of tool {function.name!r} cannot be used: {error}") from None
    except RecursionError:
        raise RequestError(f"the parameters of tool {function.name!r} are nested too deeply") from None


@lru_cache(maxsize=512)
def _inline(schema: str) -> Inline:
    from trimtab.decoding.constraints.json_schema import compile_schema

    tried: list[str] = []

    def noted(grammar: str) -> str:
        tried.append(grammar)
        return grammar

    # The same rungs as for a whole text, of which the last that was tried is the one that was taken.
    compiled = compile_schema(json.loads(schema), _bytes_tokenizer(), compact=False, wrap=noted)
    text = json.dumps(json.loads(tried[-1])["grammars"][0]["json_schema"])
    if compiled.check is None:
        return Inline(text, "", tuple(compiled.notes))
    *notes, why = compiled.notes
    named = re.search(r"does not keep (.*); the finished text", why)
    if compiled.rung == "generic":
        left = "more than that they are an object (" + why.split(": ", 1)[-1] + ")"
    else:
        left = named[1] if named else "minProperties"
    return Inline(text, left, tuple(notes))


@cache
def _bytes_tokenizer() -> Any:
    """What a schema allows is the same for every tokenizer; this one is made in no time."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")
