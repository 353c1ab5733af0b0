"""Regular expressions, choices, grammars and any JSON object; and hostile or wrong ones."""

from __future__ import annotations

import json
import re

import pytest

from decoding.constraints.helpers import accepts, allowed, compiler, constraint, walk
from evaluation.fakes import shipped_tokenizer
from trimtab.decoding.constraints.base import StructuredOutputs
from trimtab.decoding.constraints.compiler import Compiler
from trimtab.errors import RequestError

REGEXES = [
    r"abc",
    r"^abc$",
    r"a|bc",
    r"(a|b)*c",
    r"[0-9]{3}-[0-9]{4}",
    r"\d{1,3}(\.\d{1,3}){3}",
    r"[^a-z\s]+",
    r"a/b\/c",
    r"line\nbreak",
    r"(?i)yes|no",
    r'"[^"]*"',
    r"é+ü?",
    r"\w{1,3}@\w{1,3}\.com",
    r"a*?b",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_a_regex_is_matched_by_the_whole_text(regex):
    compiled = constraint(regex=regex)
    assert compiled.exact
    ended = [text for text in (walk(compiled, seed, 60) for seed in range(8)) if text is not None]
    assert ended, "some walk must end"
    for text in ended:
        assert re.fullmatch(regex, text, re.ASCII), text
    for text in [
        "abc",
        "xabc",
        "abcx",
        "a",
        "bc",
        "aabc",
        "123-4567",
        "YES",
        "no",
        "",
        "a/b/c",
        '"x y"',
        "éé",
    ]:
        assert accepts(compiled, text) == bool(re.fullmatch(regex, text, re.ASCII)), text


CHOICES = [
    'say "hi"',
    "two\nlines",
    "a\\b",
    "naïve 🎉",
    "a",
    "ab",
    "{}",
    "/slash/",
    "%json",
    " space",
    "tab\t",
    "\x01",
]


def test_a_choice_is_one_of_the_texts():
    compiled = constraint(choice=CHOICES)
    for text in CHOICES:
        assert accepts(compiled, text), text
        assert not accepts(compiled, text + "?")
    walked = {walk(compiled, seed) for seed in range(60)}
    assert walked <= set(CHOICES) and len(walked) > 5
    assert not accepts(compiled, "") and not accepts(compiled, "space")


def test_json_object_is_any_object_and_nothing_else():
    compiled = constraint(json_object=True)
    for text in ["{}", '{"a": [1, {"b": null}]}', '{"a":1.5e3}', '{\n  "a": true\n}']:
        assert accepts(compiled, text), text
    for text in ["[]", "1", '{"a":}', "{} ", '{"a": 1,}', "{a: 1}", "{" + " " * 30 + "}"]:
        assert not accepts(compiled, text), text
    texts = [walk(compiled, seed) for seed in range(10)]
    assert sum(isinstance(json.loads(text), dict) for text in texts if text is not None) >= 3


def test_white_space_can_be_left_out_altogether():
    compact = constraint(json={"type": "array"}, disable_any_whitespace=True)
    assert accepts(compact, '[1,{"a b":2}]') and not accepts(compact, "[1, 2]")


def test_a_grammar_may_recurse():
    compiled = constraint(grammar='start: "(" start ")" | "x"')
    assert accepts(compiled, "((((x))))") and not accepts(compiled, "((x)")


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"regex": "(a"}, "structured_outputs.regex.*unclosed group"),
        ({"regex": "(?=a)b"}, "regex.*look-around"),
        ({"regex": r"(a)\1"}, "regex.*backreferences"),
        ({"regex": "\ud800+"}, "surrogate"),
        ({"choice": ["a", "\ud800"]}, "structured_outputs.choice is not valid Unicode"),
        ({"grammar": 'begin: "a"'}, "structured_outputs.grammar cannot be used.*start"),
        ({"grammar": "start: ("}, "structured_outputs.grammar cannot be used"),
        ({"grammar": "start: other"}, "grammar cannot be used.*other"),
        ({"grammar": "start: <|nosuch|>"}, "grammar cannot be used.*nosuch"),
    ],
)
def test_wrong_ones_are_refused_in_one_sentence(wish, words):
    with pytest.raises(RequestError, match=words) as caught:
        constraint(**wish)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


HOSTILE = [
    {"regex": "(a+)+(a+)+(a+)+$"},
    {"regex": "(x{1,1000}){1,1000}y"},
    {"regex": "(.*a){40}"},
    {"regex": ".*[ab].{3000}"},
    {"regex": "(" * 3000 + "a" + ")" * 3000},
    {"grammar": 'start: start start | "a" |'},
    {"grammar": "start: /a{1,90000}/ /(b|c){1,90000}/"},
    {"json": {"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$"}},
    {"json": {"type": "array", "minItems": 10**9}},
    {"json": {"type": "string", "minLength": 10**9}},
    {
        "json": {
            "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(40)}
            | {"a40": {}},
            "$ref": "#/$defs/a0",
        }
    },
    {"json": {"$ref": "#"}},
    {"json": {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}]}},
    {"json": {"enum": [f"value {i}" for i in range(20_000)]}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2500)}}},
    {"json": {"oneOf": [{"not": {"pattern": "(a+)+$"}}, {"pattern": "(.*b){30}"}]}},
]


@pytest.mark.parametrize("wish", HOSTILE, ids=lambda w: str(w)[:40])
def test_hostile_wishes_end_in_a_mask_or_an_error(wish):
    try:
        compiled = constraint(**wish)
    except RequestError as error:
        assert len(str(error)) < 600
        return
    state = compiled.start()
    for _ in range(30):
        choices = allowed(state)
        if state.error is not None:
            assert choices == [], "a broken parser must not let a text end as if it were complete"
            assert "limit" in state.error
            return
        if state.stopped:
            return
        if not state.advance(choices[-1]):
            assert "limit" in (state.error or ""), "only a limit may refuse what the mask allows"
            return
    compiled.check("a" * 40)
    compiled.check(json.dumps("a" * 40 + "!"))


def test_deep_and_large_schemas_are_refused():
    deep: dict = {}
    for _ in range(300):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="levels deep"):
        constraint(json=deep)
    with pytest.raises(RequestError, match="characters long"):
        constraint(regex="a" * 1_100_000)
    with pytest.raises(RequestError, match="parts"):
        constraint(json={"enum": list(range(60_000))})


def test_a_slow_compilation_is_given_up_and_not_started_again(monkeypatch):
    import threading

    tokenizer = shipped_tokenizer()
    slow = Compiler(tokenizer, 4096, tokenizer.eos_ids)
    go_on, started = threading.Event(), []
    build = slow._build

    def waits(wish):
        started.append(wish)
        go_on.wait(30)
        return build(wish)

    monkeypatch.setattr(slow, "_build", waits)
    wish = StructuredOutputs(choice=["a"])
    for _ in range(2):
        with pytest.raises(RequestError, match=r"structured_outputs\.choice takes more than 0\.05 s"):
            slow.compile(wish, timeout_s=0.05)
    assert len(started) == 1
    go_on.set()
    assert slow.compile(wish, timeout_s=30).start().accepting is False
    assert compiler() is not slow
