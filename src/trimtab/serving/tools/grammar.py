"""The grammar of an answer with tool calls: free text up to the trigger, then calls that fit their schemas.

It is llguidance's form of Lark with the schemas inline (https://github.com/guidance-ai/llguidance,
docs/syntax.md): a lazy lexeme ends free text as soon as the trigger stands there. A marker that is one token
of the vocabulary is given by its id, since the mask engine takes some such tokens for special ones, which
no text matches.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.errors import RequestError
from trimtab.models.tokenizer import Tokenizer
from trimtab.serving.tools.definitions import Choice
from trimtab.serving.tools.formats import ToolFormat
from trimtab.serving.tools.schemas import inline


@dataclass(frozen=True)
class CallGrammar:
    """The wish for one request.

    Attributes:
        wish: None where nothing is asked of the text.
        arguments_of: the one function whose arguments alone are the whole answer, without markup; or None.
        notes: what a user should know of how the schemas are kept.
    """

    wish: StructuredOutputs | None = None
    arguments_of: str | None = None
    notes: tuple[str, ...] = ()


def call_grammar(choice: Choice, parallel: bool, form: ToolFormat, tokenizer: Tokenizer) -> CallGrammar:
    """The wish that keeps an answer to `choice`. Raises RequestError for a strict schema it cannot keep."""
    if choice.kind == "none":
        return CallGrammar()
    kept = [inline(function) for function in choice.functions]
    forced = choice.kind == "named" or (choice.kind == "required" and not parallel)
    if forced and len(kept) == 1 and kept[0].left:
        # As the whole text it can be checked at its end, which a part of a grammar cannot.
        (only,) = choice.functions
        return CallGrammar(StructuredOutputs(json=only.schema), only.name)
    notes = []
    for function, schema in zip(choice.functions, kept, strict=True):
        notes += [f"tool {function.name!r}: {note}" for note in schema.notes]
        if schema.left and function.strict:
            raise RequestError(
                f"tool {function.name!r} is strict, but among other tools its parameters cannot be kept "
                f"exactly, namely {schema.left}; leave that out, or drop strict, or choose this function by "
                "name, since then the finished arguments can be checked"
            )
        if schema.left:
            notes.append(f"tool {function.name!r}: its arguments are not kept to {schema.left}")
    lark = _lark(choice, [schema.text for schema in kept], parallel, form, tokenizer)
    return CallGrammar(StructuredOutputs(grammar=lark), notes=tuple(notes))


def _lark(
    choice: Choice, schemas: Sequence[str], parallel: bool, form: ToolFormat, tokenizer: Tokenizer
) -> str:
    markers = form.marker_ids(tokenizer)

    def in_turn(texts: Sequence[str]) -> str:
        ids = [(text, markers[text]) for text in texts]
        return " WS? ".join(json.dumps(text) if i is None else f"<[{i}]>" for text, i in ids)

    # After the first call's beginning.
    more = f"(WS? {in_turn(form.between)} WS? call)*" if parallel and choice.kind != "named" else ""
    rest = f"{more} WS? {in_turn(form.closing)}" if form.closing else more
    trigger = markers[form.trigger]
    # A bare form needs its opening only where that is one token: nobody learnt to spell it.
    opens = not form.bare or trigger is not None
    starts = []
    lines = []
    if choice.kind == "auto":
        starts.append("TEXT?")
        if opens:
            starts.append(f"lead {' WS? '.join(['', in_turn(form.opening[1:])])} WS? call {rest}")
            lines.append(f"lead: spelt{'' if trigger is None else f' | TEXT? <[{trigger}]>'}")
            lines.append(f"spelt[lazy]: TEXT? {json.dumps(form.trigger)}")
        if form.bare:
            starts.append(f"head end_of_call {rest}")
            lines.append(r"""head[lazy]: /[ \t\r\n]*\{[ \t\r\n]*"name"[ \t\r\n]*:/""")
        lines.append("TEXT: /(?s:.+)/")
    else:
        if opens:
            starts.append(f"{in_turn(form.opening)} WS? call {rest}")
        if form.bare:
            starts.append(f"call {rest}")
    rules = "\n".join([*lines, *_calls(choice, schemas, form), ""])
    # `start` may be renamed, so nothing else may read like it: a tool or a property, say.
    rules = rules.replace("start", r"\u0073tart")
    return f"start: {' | '.join(starts)}\n{rules}"


def _calls(choice: Choice, schemas: Sequence[str], form: ToolFormat) -> list[str]:
    """The rules of `call`, which may be any of the functions."""
    names = " | ".join(f"call_{i}" for i in range(len(schemas)))
    own_id = r"""(WS? "," WS? "\"id\"" WS? ":" WS? /"[a-zA-Z0-9]{9}"/)?""" if form.short_ids else ""
    lines = [
        r"""call: "{" WS? "\"name\"" WS? ":" end_of_call""",
        f'end_of_call: WS? ({names}) {own_id} WS? "}}"',
        r"WS: /[ \n]/",
    ]
    key = _quoted(form.arguments_key)
    for i, (function, schema) in enumerate(zip(choice.functions, schemas, strict=True)):
        name = _quoted(function.name)
        lines.append(f'call_{i}: {name} WS? "," WS? {key} WS? ":" WS? arguments_{i}')
        lines.append(f"arguments_{i}: %json {schema}")
    return lines


def _quoted(text: str) -> str:
    """A JSON string as a literal of the grammar."""
    return json.dumps(json.dumps(text))
