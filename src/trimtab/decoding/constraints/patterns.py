"""Strings a JSON schema describes: `pattern` and `format`, with one meaning for masks and for validation.

JSON schema means ECMA-262 by `pattern`, llguidance reads Rust's dialect and Python's `re` is a third one that
moreover can take forever. So patterns are rewritten for llguidance (`parts`), and texts are checked by
llguidance too (`StringForm`), in time linear in the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLTokenizer

from trimtab.decoding.constraints.guidance import first_line, match
from trimtab.errors import RequestError

# What ECMA-262 calls white space, and the characters that its `.` leaves out.
SPACE = "\\t\\n\\v\\f\\r \\u00a0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
_DOT = "[^\\n\\r\\u2028\\u2029]"


class Part(NamedTuple):
    """A pattern that some place of the text must match, or (`wanted` False) that none may."""

    wanted: bool
    pattern: str


class StringForm:
    """Whether texts have the form of a string schema (`pattern`, `format`), by the parser that makes masks.

    Raises RequestError for what llguidance cannot read.
    """

    def __init__(self, keyword: str, schema: Mapping[str, Any]) -> None:
        options = {"x-guidance": {"whitespace_flexible": False, "lenient": False}}
        grammar = LLMatcher.grammar_from_json_schema({"type": "string", **schema, **options})
        self._matcher, problem = match(grammar, byte_tokenizer())
        if problem:
            raise RequestError(f"{keyword} {_brief(schema)} is not supported: {first_line(problem)}")

    def matches(self, text: str) -> bool:
        shown = json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")
        data = list(shown.encode("utf-8", "surrogatepass"))
        matcher = self._matcher.deep_copy()
        return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


class Pattern:
    """A pattern of a JSON schema. Raises RequestError that names `keyword` if it cannot be kept."""

    def __init__(self, pattern: str, keyword: str = "pattern") -> None:
        self._forms = [
            (part.wanted, StringForm(keyword, {"pattern": part.pattern})) for part in parts(pattern)
        ]

    def search(self, text: str) -> bool:
        """Whether some place of the text matches."""
        return all(form.matches(text) is wanted for wanted, form in self._forms)


@lru_cache(maxsize=1024)
def pattern(text: str, keyword: str = "pattern") -> Pattern:
    """`Pattern(text, keyword)`, made once."""
    return Pattern(text, keyword)


def parts(text: str) -> list[Part]:
    """Patterns in llguidance's dialect that together mean the same.

    Looking ahead at the very beginning, `^(?!a)(?=b)c`, is taken apart: that is how it is mostly used.
    """
    found: list[Part] = []
    rest = text
    if text.startswith(("^(?!", "^(?=")) and not _has_alternatives(text):
        rest = text[1:]
        while rest.startswith(("(?!", "(?=")):
            end = _closing(rest)
            found.append(Part(rest[2] == "=", f"^(?:{_dialect(rest[3:end])})"))
            rest = rest[end + 1 :]
        rest = "^" + rest
        if rest in ("^", "^.*"):
            return found
    return [*found, Part(True, _dialect(rest))]


def _dialect(text: str) -> str:
    """ECMA's shorthands written out; llguidance itself reads `\\d` and `\\w` as ASCII."""
    out: list[str] = []
    at, in_class = 0, False
    while at < len(text):
        char = text[at]
        step = 2 if char == "\\" else 1
        piece = text[at : at + step]
        if piece == "\\s":
            piece = SPACE if in_class else f"[{SPACE}]"
        elif piece == "\\S" and not in_class:
            piece = f"[^{SPACE}]"
        elif piece == "\\/":
            piece = "/"
        elif piece == "." and not in_class:
            piece = _DOT
        elif piece == "[":
            if in_class:
                piece = "\\["  # a class inside a class is Rust's own
            in_class = True
        elif piece == "]":
            in_class = False
        elif in_class and piece in "&~" and text[at : at + 2] == piece * 2:
            piece = "\\" + piece  # set operations are Rust's own
        out.append(piece)
        at += step
    return "".join(out)


def _scan(text: str, start: int = 0):
    """(position, character, depth of brackets before it) of what is neither escaped nor in a class."""
    at, depth, in_class = start, 0, False
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 2
            continue
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        else:
            yield at, char, depth
            depth += (char == "(") - (char == ")")
        at += 1


def _has_alternatives(text: str) -> bool:
    return any(char == "|" and depth == 0 for _, char, depth in _scan(text))


def _closing(text: str) -> int:
    """Where the bracket that opens `text` closes."""
    for at, char, depth in _scan(text):
        if char == ")" and depth == 1:
            return at
    raise RequestError(f"pattern {text!r} has a bracket that is not closed")


def _brief(schema: Mapping[str, Any]) -> str:
    shown = repr(next(iter(schema.values())))
    return shown if len(shown) <= 80 else shown[:77] + "..."


class _Bytes:
    """A vocabulary of the 256 bytes and an end token, which llguidance takes as a tokenizer."""

    is_tokenizer_wrapper = True
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode("utf-8"))


@lru_cache(maxsize=1)
def byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(_Bytes())  # type: ignore[arg-type]
