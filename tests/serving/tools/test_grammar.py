import json
import re

import jsonschema
import pytest

import trimtab
from serving.tools.cases import SCHEMAS, TOKENIZERS, TOOLS, WEATHER, accepts, plan_for, tool, walk
from trimtab.errors import RequestError
from trimtab.serving.tools import FORMATS

FORMS = ["hermes", "llama3", "mistral", "generic"]
OSLO, POINT = '{"city": "Oslo"}', '{"points":[{"x":3}],"near":null}'


def pair(key: str, around: str, between: str) -> str:
    first = f'{{"name": "get_weather", "{key}": {OSLO}}}'
    second = f'{{"name": "find-places", "{key}": {POINT}}}'
    return around.replace("...", first + between + second)


CALLS = {
    "hermes": pair("arguments", "<tool_call>\n...\n</tool_call>", "\n</tool_call>\n<tool_call>\n"),
    "llama3": pair("parameters", "...", "; "),
    "mistral": pair("arguments", "[TOOL_CALLS] [...]", ", "),
}
CALLS["generic"] = CALLS["hermes"]


def one(form: str) -> str:
    between = {"llama3": "; ", "mistral": ", {", "hermes": "\n<tool", "generic": "\n<tool"}[form]
    return CALLS[form].split(between)[0] + ("]" if form == "mistral" else "")


@pytest.mark.parametrize("kind", ["plain", "marked"])
@pytest.mark.parametrize("form", FORMS)
class TestWhatIsAllowed:
    def test_auto(self, form, kind):
        plan = plan_for(form, kind)
        assert accepts(plan, "Just words, 2 < 3 and {braces}.", kind)
        assert accepts(plan, CALLS[form], kind)
        assert accepts(plan, one(form), kind)
        assert accepts(plan, "", kind)
        assert not accepts(plan, CALLS[form].replace("get_weather", "get_money"), kind)
        assert not accepts(plan, CALLS[form].replace('"city"', '"town"'), kind)
        assert not accepts(plan, one(form) + "And then?", kind)

    def test_auto_after_words(self, form, kind):
        begin = "<|python_tag|>" if form == "llama3" else ""
        if form == "llama3" and kind == "plain":
            pytest.skip("without the token there is no way from words to a call")
        plan = plan_for(form, kind)
        assert accepts(plan, f"Let me see.\n{begin}{CALLS[form]}", kind)
        assert not accepts(plan, f"Let me see.\n{begin}{CALLS[form]}".replace("Oslo", "O" * 13), kind)

    def test_required(self, form, kind):
        plan = plan_for(form, kind, "required")
        assert accepts(plan, CALLS[form], kind)
        assert not accepts(plan, "", kind)
        assert not accepts(plan, "Words " + CALLS[form], kind)

    def test_named(self, form, kind):
        plan = plan_for(form, kind, {"type": "function", "function": {"name": "get_weather"}})
        assert accepts(plan, one(form), kind)
        assert not accepts(plan, CALLS[form], kind)
        assert not accepts(plan, one(form).replace("get_weather", "now").replace(OSLO, "{}"), kind)

    @pytest.mark.parametrize("choice", ["auto", "required"])
    def test_not_parallel(self, form, kind, choice):
        plan = plan_for(form, kind, choice, parallel=False)
        assert accepts(plan, one(form), kind)
        assert not accepts(plan, CALLS[form], kind)

    def test_however_it_is_tokenized(self, form, kind):
        pieces = re.split(r"(</?tool_call>|\[TOOL_CALLS\])", CALLS[form])
        pieces = [c for i, piece in enumerate(pieces) for c in ([piece] if i % 2 else piece)]
        ids = [i for c in pieces for i in TOKENIZERS[kind]().encode(c, add_special_tokens=False)]
        assert accepts(plan_for(form, kind, "auto"), CALLS[form], kind, ids)

    def test_blanks_are_bounded(self, form, kind):
        assert not accepts(plan_for(form, kind), CALLS[form].replace('"city": ', '"city":   '), kind)


@pytest.mark.parametrize("kind", ["plain", "marked"])
@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize(
    ("choice", "parallel"), [("auto", None), ("required", None), ("required", False), ("named", None)]
)
@pytest.mark.parametrize("seeds", [range(6), pytest.param(range(6, 100), marks=pytest.mark.slow)], ids=str)
def test_random_answers_are_valid_calls(form, kind, choice, parallel, seeds):
    wanted = {"type": "function", "function": {"name": "get_weather"}} if choice == "named" else choice
    plan = plan_for(form, kind, wanted, parallel)
    ended = called = 0
    for seed in seeds:
        # By chance alone few texts would hit upon a trigger.
        bare = form == "llama3" and (kind == "plain" or seed % 4 == 1)
        trigger = '{"name":' if bare else FORMATS[form].trigger
        text, reason = walk(plan, kind, seed, trigger if choice == "auto" and seed % 2 else "")
        parsed = plan.parser()
        parsed.push(text)
        got = parsed.finish(reason)
        for call in got.tool_calls:
            if call.complete:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        if reason == "length":
            assert got.finish_reason == "length"
            continue
        ended += 1
        called += bool(got.tool_calls)
        assert all(call.complete for call in got.tool_calls)
        if choice != "auto":
            assert got.content is None
            assert got.tool_calls
        elif not got.tool_calls:
            assert got.finish_reason == "stop"
        if parallel is False:
            assert len(got.tool_calls) <= 1
        if choice == "named":
            assert [c.name for c in got.tool_calls] == ["get_weather"]
        if got.tool_calls:
            assert got.finish_reason == ("stop" if choice == "named" else "tool_calls")
    assert ended >= len(seeds) // 2
    assert called >= ended // 4


def test_none_asks_nothing_of_the_text():
    plan = plan_for("hermes", choice="none")
    assert plan.wish is None
    assert plan.template_tools is not None


def test_no_parameters_mean_no_arguments():
    plan = plan_for("hermes", choice="required", tools=[tool("now")])
    call = '<tool_call>{"name": "now", "arguments": %s}</tool_call>'
    assert accepts(plan, call % "{}")
    assert not accepts(plan, call % '{"a": 1}')


UNIQUE = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


def test_a_mistral_model_may_write_an_id_of_its_own():
    plan = plan_for("mistral", "marked", "required")
    text = '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "%s"}]'
    assert accepts(plan, text % "a1b2c3d4e", "marked")
    assert not accepts(plan, text % "a1", "marked")


class TestSchemasTheEngineCannotKeep:
    @pytest.mark.parametrize(
        ("choice", "parallel"),
        [({"type": "function", "function": {"name": "f"}}, None), ("required", False)],
    )
    def test_one_forced_function_is_checked_as_a_whole(self, choice, parallel):
        plan = plan_for("hermes", choice=choice, parallel=parallel, tools=[tool("f", UNIQUE, strict=True)])
        assert plan.wish is not None
        assert plan.wish.json == UNIQUE
        assert plan.skip_special_tokens
        parser = plan.parser()
        first = parser.push('{"a": [1')
        assert (first[0].name, first[1].arguments) == ("f", '{"a": [1')
        parser.push(", 2]}")
        got = parser.finish("stop")
        assert [(c.name, c.arguments) for c in got.tool_calls] == [("f", '{"a": [1, 2]}')]
        assert got.content is None

    def test_strict_is_refused_by_tool_and_keyword(self):
        with pytest.raises(RequestError, match=r"tool 'f' is strict.*uniqueItems"):
            plan_for("hermes", tools=[*TOOLS, tool("f", UNIQUE, strict=True)])

    def test_else_the_rest_of_the_schema_is_kept(self):
        plan = plan_for("hermes", tools=[*TOOLS, tool("f", UNIQUE)])
        assert len(plan.notes) == 1
        assert "uniqueItems" in plan.notes[0]
        call = '<tool_call>{"name": "f", "arguments": {"a": %s}}</tool_call>'
        assert accepts(plan, call % "[1, 1]")
        assert not accepts(plan, call % "1")

    def test_one_that_no_mask_can_keep_is_refused(self):
        schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=x)x"}}}
        with pytest.raises(RequestError, match=r"parameters of tool 'f' cannot be used: pattern"):
            plan_for("hermes", tools=[*TOOLS, tool("f", schema)])
        with pytest.raises(RequestError, match=r"tool 'f' cannot be used: .*no JSON text"):
            plan_for("hermes", tools=[tool("f", {"properties": {"a": False}, "required": ["a"]})])

    def test_what_can_be_said_in_other_words_is_exact(self):
        schema = {"type": "object", "not": {"required": ["a"]}, "properties": {"d": {"format": "date"}}}
        plan = plan_for("hermes", tools=[*TOOLS, tool("f", schema, strict=True)])
        assert plan.notes == ()
        call = '<tool_call>{"name": "f", "arguments": {"%s": "%s"}}</tool_call>'
        assert accepts(plan, call % ("d", "2024-02-29"))
        assert not accepts(plan, call % ("d", "2023-02-29"))
        assert not accepts(plan, call % ("a", "b"))

    def test_a_schema_cannot_loosen_itself(self):
        loose = {**WEATHER, "x-guidance": {"lenient": True, "whitespace_pattern": "[\\x20]+"}}
        plan = plan_for("hermes", choice="required", tools=[tool("f", loose)])
        call = '<tool_call>{"name": "f", "arguments": {"city":%s"Oslo"}}</tool_call>'
        assert accepts(plan, call % " ")
        assert not accepts(plan, call % "   ")

    def test_names_that_are_words_of_the_grammar(self):
        # A tokenizer that drops a first space has the rule `start` renamed.
        schema = {"type": "object", "properties": {"start": {"const": "start"}}, "required": ["start"]}
        plan = plan_for("hermes", choice="required", tools=[tool("start", schema)])
        assert plan.wish is not None
        assert plan.wish.grammar is not None
        assert len(re.findall(r"\bstart\b", plan.wish.grammar)) == 1
        assert accepts(plan, '<tool_call>{"name": "start", "arguments": {"start": "start"}}</tool_call>')


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "now"}}])
def test_the_engine_keeps_it(choice):
    model = trimtab.load()
    plan = plan_for("generic", choice=choice, tools=TOOLS)
    assert plan.wish is not None
    params = trimtab.SamplingParams(max_tokens=100, seed=1, structured_outputs=plan.wish)
    (output,) = trimtab.Engine(model).generate(["<|user|>What time is it?<|end|><|assistant|>"], params)
    parser = plan.parser()
    parser.push(output.outputs[0].text)
    got = parser.finish(output.outputs[0].finish_reason)
    if choice == "auto":
        assert got.content or got.tool_calls
    else:
        assert got.content is None
        for call in got.tool_calls:
            if call.complete:
                jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    if isinstance(choice, dict):
        assert [(call.name, json.loads(call.arguments)) for call in got.tool_calls] == [("now", {})]
        assert got.finish_reason == "stop"
