import json

import pytest

from models.chat_templates import LLAMA2, LLAMA3, MISTRAL, MIXTRAL, QWEN25
from serving.tools.cases import (
    PLAIN,
    QWEN_TEXT_ARGUMENTS,
    TOOLS,
    marked_tokenizer,
    plain_tokenizer,
    plan_for,
)
from trimtab.errors import RequestError
from trimtab.serving.tools import prepare
from trimtab.serving.tools.history import takes_objects, takes_system

CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
CHAT = [
    {"role": "user", "content": "How is Oslo?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    RESULT,
]


def prompt(plan, source, messages=CHAT, tokenizer=None):
    tokenizer = tokenizer or plain_tokenizer()
    return tokenizer.apply_chat_template(
        plan.messages(messages), tools=plan.template_tools, chat_template=source
    )


def planned(source, tools=TOOLS, choice=None, **more):
    return prepare(tools, choice, None, source, plain_tokenizer(), **more)


class TestTemplatesThatKnowTools:
    @pytest.mark.parametrize("source", [QWEN25, QWEN_TEXT_ARGUMENTS])
    def test_arguments_are_printed_once_encoded(self, source):
        text = prompt(planned(source), source)
        assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in text
        assert "find-places" in text
        assert "<tool_response>\nrain" in text

    def test_which_arguments_a_template_takes(self):
        tokenizer = plain_tokenizer()
        assert takes_objects(tokenizer, QWEN25)
        assert takes_objects(tokenizer, LLAMA3)
        assert takes_objects(tokenizer, MISTRAL)
        assert not takes_objects(tokenizer, QWEN_TEXT_ARGUMENTS)

    def test_llama(self):
        text = prompt(planned(LLAMA3), LLAMA3)
        assert '{"name": "get_weather", "parameters": {"city": "Oslo"}}' in text

    def test_mistral_gets_the_short_ids_it_insists_on(self):
        messages = [
            *CHAT,
            {"role": "assistant", "content": "It rains."},
            {"role": "user", "content": "And now?"},
        ]
        plan = planned(MISTRAL)
        text = prompt(plan, MISTRAL, messages)
        short = plan.messages(messages)[2]["tool_call_id"]
        assert len(short) == 9
        assert text.count(short) == 2
        own = [{**RESULT, "tool_call_id": "a1b2c3d4e"}]
        assert plan.messages(own)[0]["tool_call_id"] == "a1b2c3d4e"

    def test_the_request_is_left_alone(self):
        before = json.dumps(CHAT)
        for source in (QWEN25, MISTRAL, PLAIN):
            planned(source).messages(CHAT)
        assert json.dumps(CHAT) == before

    @pytest.mark.parametrize("arguments", ['{"city": "Os', "[1]", "[" * 100_000])
    def test_arguments_that_are_no_object(self, arguments):
        call = {**CALL, "function": {"name": "f", "arguments": arguments}}
        with pytest.raises(RequestError, match=r"messages\[1\].tool_calls\[0\].function.arguments"):
            planned(QWEN25).messages([CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}])

    def test_no_arguments_are_an_empty_object(self):
        call = {**CALL, "function": {"name": "now", "arguments": ""}}
        text = prompt(planned(QWEN25), QWEN25, [CHAT[0], {"role": "assistant", "tool_calls": [call]}])
        assert '{"name": "now", "arguments": {}}' in text

    def test_none_still_shows_the_tools(self):
        plan = planned(QWEN25, choice="none")
        assert "find-places" in prompt(plan, QWEN25)
        assert plan.wish is None


class TestTemplatesThatDoNot:
    def test_everything_is_text(self):
        text = prompt(planned(PLAIN), PLAIN)
        assert text.startswith("<|system|>These functions can be called")
        for name in ("get_weather", "find-places", "now"):
            assert f'{{"type": "function", "function": {{"name": "{name}"' in text
        assert (
            'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
            in text
        )
        assert text.endswith(
            '<|user|><tool_response>\n{"name": "get_weather", "content": "rain"}\n</tool_response><|end|>'
        )
        assert planned(PLAIN).template_tools is None

    def test_after_the_words_of_the_system(self):
        messages = [{"role": "system", "content": "Be kind."}, *CHAT]
        assert prompt(planned(PLAIN), PLAIN, messages).startswith("<|system|>Be kind.\n\nThese functions")

    @pytest.mark.parametrize("source", [LLAMA2, MIXTRAL])
    def test_roles_take_turns(self, source):
        messages = [*CHAT, RESULT, {"role": "user", "content": "So?"}]
        plan = planned(source)
        roles = [m["role"] for m in plan.messages(messages) if m["role"] != "system"]
        assert roles == ["user", "assistant", "user"]
        text = prompt(plan, source, messages)
        assert text.count("<tool_response>\n{") == 2
        assert "So?" in text
        assert "find-places" in text

    def test_a_template_without_a_system(self):
        drops = PLAIN.replace("%}{{", "%}{% if m['role'] != 'system' %}{{").replace(
            "}}{% end", "}}{% endif %}{% end"
        )
        tokenizer = plain_tokenizer()
        assert takes_system(tokenizer, PLAIN)
        assert not takes_system(tokenizer, MIXTRAL)
        assert not takes_system(tokenizer, drops)
        assert prompt(planned(drops), drops).startswith("<|user|>These functions")

    def test_content_in_parts(self):
        parts = [{"type": "text", "text": "Be kind."}]
        messages = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
        got = planned(PLAIN).messages([*messages, *CHAT[1:2], {**RESULT, "content": parts}, messages[1]])
        assert got[0]["content"][1]["text"].startswith("\n\nThese functions")
        assert '"content": "Be kind."' in got[3]["content"][0]["text"]
        assert got[3]["content"][1:] == parts

    def test_what_the_choice_says(self):
        one = {"type": "function", "function": {"name": "now"}}
        assert "Call the function now now" in prompt(planned(PLAIN, choice=one), PLAIN)
        assert "at least one" in prompt(planned(PLAIN, choice="required"), PLAIN)
        assert "no more than one" in prompt(plan_for("generic", parallel=False), PLAIN)
        assert "functions" not in prompt(planned(PLAIN, choice="none"), PLAIN)

    def test_history_without_tools(self):
        plan = planned(PLAIN, tools=None)
        assert plan.wish is None
        assert "<tool_response>" in prompt(plan, PLAIN)
        assert "functions" not in prompt(plan, PLAIN)

    @pytest.mark.parametrize(
        ("form", "call"),
        [
            ("llama3", '{"name": "get_weather", "parameters": {"city": "Oslo"}}'),
            ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}}]'),
        ],
    )
    def test_a_format_by_name_is_told_to_a_template_that_drops_tools(self, form, call):
        plan = planned(PLAIN, format=form)
        assert plan.template_tools is None
        text = prompt(plan, PLAIN)
        assert "These functions" in text
        assert call in text


class TestSpecialTokens:
    @pytest.mark.parametrize(
        ("form", "kind", "skips"),
        [
            ("hermes", "plain", True),
            ("hermes", "marked", True),
            ("llama3", "marked", False),
            ("mistral", "marked", False),
            ("mistral", "plain", True),
        ],
    )
    def test_kept_only_where_a_marker_is_one(self, form, kind, skips):
        assert plan_for(form, kind).skip_special_tokens is skips
        assert plan_for(form, kind, "none").skip_special_tokens

    def test_end_tokens_are_left_out(self):
        tokenizer = marked_tokenizer()
        parser = plan_for("mistral", "marked").parser()
        for i in [*tokenizer.encode("Hello", add_special_tokens=False), min(tokenizer.eos_ids)]:
            parser.push(tokenizer.decode([i], skip_special_tokens=False))
        assert parser.finish("stop").content == "Hello"


def test_a_form_that_is_not_known_is_told():
    source = QWEN25.replace("Call them", "<function=name>")
    plan = planned(source)
    assert plan.template_tools is None
    assert "not known" in plan.notes[0]
    assert "These functions" in prompt(plan, source)
    assert planned(QWEN25).notes == planned(PLAIN).notes == planned(source, tools=None).notes == ()


def test_parallel_tool_calls_needs_tools():
    with pytest.raises(RequestError, match="parallel_tool_calls is True, but the request has no tools"):
        prepare(None, None, True, PLAIN, plain_tokenizer())
    with pytest.raises(RequestError, match="parallel_tool_calls is 'no'"):
        prepare(TOOLS, None, "no", PLAIN, plain_tokenizer())  # pyright: ignore[reportArgumentType]


def test_without_tools_all_is_content():
    parser = planned(QWEN25, tools=None).parser()
    parser.push("<tool_call>")
    assert parser.finish("stop").content == "<tool_call>"
