"""The ladder for JSON schemas: as exact a mask as there is, and validation of the text where it is not exact.

1. exact: the schema, rewritten where that keeps its meaning, as a grammar;
2. relaxed: a grammar of more texts, without the keywords that llguidance cannot keep, and full validation;
3. generic: any JSON (any object, where the schema wants one), and full validation;
4. otherwise a RequestError that names the keyword.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLTokenizer

from trimtab.decoding.constraints import drafts
from trimtab.decoding.constraints.guidance import first_line, match
from trimtab.decoding.constraints.rewriting import Rewriter, without
from trimtab.decoding.constraints.validated import Validation
from trimtab.errors import RequestError

# At most one space, or one line break with its indentation: without a bound weak models never get on.
WHITE_SPACE = r"\x20|\r?\n[\x20\t]{0,20}"


class Compiled(NamedTuple):
    """`rung`: "exact", "relaxed" or "generic"; `check` is None exactly where the mask allows nothing else."""

    rung: str
    matcher: LLMatcher
    check: Validation | None
    notes: list[str]


def grammar(schema: Mapping[str, Any], *, compact: bool, lenient: bool = False) -> str:
    """llguidance's grammar for a schema; `compact`: no optional white space."""
    options: dict[str, Any] = {"whitespace_flexible": False, "lenient": lenient, "coerce_one_of": lenient}
    if not compact:
        options |= {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE}
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": options}}]})


def compile_schema(schema: Any, tokenizer: LLTokenizer, *, compact: bool, wrap: Any = None) -> Compiled:
    """The best rung for `schema` (an object or a boolean). Raises RequestError.

    `wrap`: changes the grammar before it is compiled, for tokenizers whose texts lose a first space.
    """
    if schema is False:
        raise RequestError("the JSON schema is false: no text can match it")
    schema = {} if schema is True else schema
    drafts.check_size(schema)
    if not all(isinstance(key, str) for key in schema):
        raise RequestError("the JSON schema has a key that is not a text")
    uri = drafts.draft_of(schema)
    schema = _plain(schema)
    registry = drafts.check_references(schema, uri)

    def attempt(form: Mapping[str, Any], lenient: bool = False) -> tuple[LLMatcher, str]:
        text = grammar(form, compact=compact, lenient=lenient)
        matcher, problem = match(wrap(text) if wrap else text, tokenizer)
        if "nsatisfiable" in problem:
            reason = first_line(problem).split("nsatisfiable schema:")[-1].strip()
            raise RequestError(f"no JSON text can match the schema: {drafts.shortened(reason)}")
        return matcher, problem

    problem = ""
    for split in (False, True):
        rewriter = Rewriter(uri, split)
        form = {**rewriter.whole(schema), "$schema": uri}
        notes = _format_notes(rewriter)
        matcher, found = attempt(form)
        if not found:
            if not rewriter.repeats:
                return Compiled("exact", matcher, None, notes)
            notes.append("a text that names a property twice to reach minProperties is found out at its end")
            return Compiled("relaxed", matcher, Validation(schema, uri, registry), notes)
        problem = problem or found
        if "oneOf" not in found:
            break
    check = Validation(schema, uri, registry)
    left = _keywords(problem)
    # What llguidance makes of numbers of properties when it is lenient can allow less than the schema.
    form = without(form, "minProperties", "maxProperties")
    matcher, found = attempt(form, lenient=True)
    if "patternProperty" in found or "regex parse" in found:
        left = "patternProperties"
        matcher, found = attempt(without(form, left, "additionalProperties"), lenient=True)
    if not found:
        notes.append(
            f"the mask does not keep {left}; the finished text is validated against the whole schema"
        )
        return Compiled("relaxed", matcher, check, notes)
    wide = {"type": "object"} if schema.get("type") == "object" else {}
    matcher, found_wide = attempt(wide)
    if found_wide:
        raise RequestError(f"the JSON schema cannot be compiled: {drafts.shortened(first_line(found))}")
    notes.append(
        "the mask keeps no more than JSON, and the finished text is validated against the schema: "
        + drafts.shortened(first_line(found))
    )
    return Compiled("generic", matcher, check, notes)


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy without what would change how it is read: options for llguidance, other drafts further down."""
    schema = copy.deepcopy(schema)
    schema.pop("x-guidance", None)
    for part in drafts.every(schema):
        part.pop("$schema", None)
    return schema


def _keywords(problem: str) -> str:
    """The keywords that an error of llguidance is about."""
    listed = re.search(r"Unimplemented keys: (\[.*?\])", problem)
    if listed:
        return ", ".join(json.loads(listed[1]))
    named = [
        name for name in ("oneOf", "minProperties", "patternProperties", "multipleOf") if name[3:] in problem
    ]
    return named[0] if named else "all of it (" + drafts.shortened(first_line(problem), 100) + ")"


def _format_notes(rewriter: Rewriter) -> list[str]:
    notes = []
    if rewriter.ignored:
        notes.append(f"format {', '.join(sorted(rewriter.ignored))} is not enforced")
    if rewriter.narrowed:
        notes.append(f"format {', '.join(sorted(rewriter.narrowed))} is written in ASCII only")
    return notes
