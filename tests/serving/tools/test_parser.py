import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.serving.tools import FORMATS, ToolParser

ARGUMENTS = ['{"city": "Oslo"}', "{}", '{"a":{"b":["}","\\"]{","\\\\"]},"c":null}', '{"é": "</tool_call>"}']
WRAP = {
    "hermes": ('<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>', "\n", "%s"),
    "llama3": ('{"name": "%s", "parameters": %s}', "; ", "%s"),
    "mistral": ('{"name": "%s", "arguments": %s}', ", ", "[TOOL_CALLS] [%s]"),
}
END = "<|end|>"


def written(form, calls):
    one, between, around = WRAP[form]
    return around % between.join(one % call for call in calls)


def read(parser, pieces, reason="stop"):
    """The answer, and the same as put together from the deltas."""
    deltas = [delta for piece in pieces for delta in parser.push(piece)]
    parsed = parser.finish(reason)
    content, calls = "", []
    for delta in [*deltas, *parsed.deltas]:
        chunk = delta.to_openai()
        content += chunk.get("content", "")
        for part in chunk.get("tool_calls", ()):
            if "id" in part:
                assert part["index"] == len(calls)
                calls.append([part["function"]["name"], ""])
            calls[part["index"]][1] += part["function"]["arguments"]
    assert content == (parsed.content or "")
    assert calls == [[call.name, call.arguments] for call in parsed.tool_calls]
    return (
        parsed.content,
        [(call.name, call.arguments, call.complete) for call in parsed.tool_calls],
        parsed.finish_reason,
    )


def parser_of(form, **more):
    return ToolParser(FORMATS[form], drop=(END,), **more)


@pytest.mark.parametrize("form", WRAP)
class TestWholeCalls:
    def test_calls_alone(self, form):
        calls = [(f"f_{i}", arguments) for i, arguments in enumerate(ARGUMENTS)]
        got = read(parser_of(form), [written(form, calls) + END])
        assert got == (None, [(*call, True) for call in calls], "tool_calls")

    def test_words_alone(self, form):
        assert read(parser_of(form), [f"A <b> and [c] {END}"]) == ("A <b> and [c] ", [], "stop")

    def test_words_before_calls(self, form):
        begin = "<|python_tag|>" if form == "llama3" else ""
        text = "Let me see.\n" + begin + written(form, [("f", "{}")])
        assert read(parser_of(form), [text]) == ("Let me see.\n", [("f", "{}", True)], "tool_calls")

    def test_blanks_before_calls_are_no_content(self, form):
        assert read(parser_of(form), ["\n", "\n" + written(form, [("f", "{}")])])[0] is None

    def test_a_named_function_keeps_stop(self, form):
        parser = parser_of(form, stop_reason_kept=True)
        assert read(parser, [written(form, [("f", "{}")])])[2] == "stop"

    def test_name_at_once_and_arguments_in_pieces(self, form):
        parser = parser_of(form)
        text = written(form, [("f", '{"a": "bc"}')])
        at = text.index('"f"') + 3
        assert [d.name for d in parser.push(text[:at])] == ["f"]
        at_value = text.index("bc") + 1
        assert "".join(d.arguments for d in parser.push(text[at:at_value])) == '{"a": "b'

    def test_ids_are_own_ones(self, form):
        parser = parser_of(form)
        parser.push(written(form, [("f", "{}")] * 50))
        ids = [call.id for call in parser.finish("stop").tool_calls]
        assert len(set(ids)) == 50
        assert all(re.fullmatch("[a-z0-9]{9}" if form == "mistral" else "call_[0-9a-f]{24}", i) for i in ids)

    @pytest.mark.parametrize("cut", range(1, 60))
    def test_cut_off(self, form, cut):
        text = written(form, [("get_weather", '{"city": "Oslo"}')])[:cut]
        content, calls, reason = read(parser_of(form), [text], "length")
        assert reason == "length"
        marks = [mark for mark in ("<tool_call>", "[TOOL_CALLS]") if mark in text]
        assert not marks or content is None
        if '"get_weather"' in text:
            begun = text.split('s": ')[-1].split("}")[0] if 's": ' in text else ""
            assert content is None
            assert calls[0][0] == "get_weather"
            assert calls[0][1].rstrip("}") == begun
        else:
            assert not calls


def test_half_a_trigger_at_the_end_is_text():
    assert read(parser_of("hermes"), ["1 <tool"], "stop") == ("1 <tool", [], "stop")


def test_a_trigger_with_no_call_behind_it_loses_no_words():
    content, calls, _ = read(parser_of("hermes"), ["see <tool_call> I think"])
    assert (content, calls) == ("see  I think", [])


def test_json_that_is_no_call_is_content():
    assert read(parser_of("llama3"), ['{"named": 1}'])[0] == '{"named": 1}'
    assert read(parser_of("llama3"), ['Say {"name": "f", "parameters": {}}'])[1] == []


def test_the_other_key_is_handed_out_as_it_is():
    got = read(parser_of("hermes"), ['<tool_call>{"name": "f", "parameters": {}}</tool_call>'])
    assert got == (None, [("f", ', "parameters": {}}</tool_call>', False)], "stop")


def test_an_id_of_the_models_own_is_passed_over():
    text = '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdefghi"}, {"name": "g", "arguments": {}}]'
    want = (None, [("f", "{}", True), ("g", "{}", True)], "tool_calls")
    assert read(parser_of("mistral"), [text]) == want
    assert read(parser_of("mistral"), list(text)) == want


def test_without_a_format_all_is_content():
    text = written("hermes", [("f", "{}")])
    assert read(ToolParser(None), [" ", text]) == (" " + text, [], "stop")


def test_arguments_alone():
    parser = ToolParser(FORMATS["hermes"], drop=(END,), arguments_of="f")
    assert read(parser, list('{"a": "}"}' + END)) == (None, [("f", '{"a": "}"}', True)], "tool_calls")


PARTS = st.one_of(
    st.text(max_size=6),
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[",
            "]",
            "{",
            "}",
            '{"name": "f"',
            ', "arguments": {',
            ";",
        ]
        + [
            " ",
            "\n",
            ",",
            "<|python_tag|>",
            END,
            '"',
            "\\",
            "<tool",
            "[TOOL",
            ', "parameters": {"a":1}',
            '"id": "',
        ],
    ),
    st.builds(
        lambda form, calls: written(form, calls),
        st.sampled_from(list(WRAP)),
        st.lists(
            st.tuples(st.sampled_from(["f", "g-h"]), st.sampled_from(ARGUMENTS)), min_size=1, max_size=3
        ),
    ),
)


@given(
    form=st.sampled_from(list(WRAP)),
    text=st.lists(PARTS, max_size=8).map("".join),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    alone=st.booleans(),
    reason=st.sampled_from(["stop", "length"]),
)
@settings(max_examples=150, deadline=None)
def test_pieces_do_not_matter(form, text, cuts, alone, reason):
    more = {"arguments_of": "f"} if alone else {}
    whole = read(parser_of(form, **more), [text], reason)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert read(parser_of(form, **more), pieces, reason) == whole
    assert read(parser_of(form, **more), list(text), reason) == whole


@given(
    form=st.sampled_from(list(WRAP)),
    names=st.lists(st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True), min_size=1, max_size=3),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    ),
    ascii=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_any_arguments_come_back(form, names, value, ascii):
    arguments = json.dumps({"value": value}, ensure_ascii=ascii)
    calls = [(name, arguments) for name in names]
    assert read(parser_of(form), list(written(form, calls)))[1] == [(*call, True) for call in calls]
