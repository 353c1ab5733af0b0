"""`/v1/chat/completions` through the official client."""

from __future__ import annotations

import asyncio
import inspect
import json
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from openai.resources.chat.completions import Completions

from trimtab import Engine, SamplingParams
from trimtab.serving.chat import ChatCall
from trimtab.serving.models import ServedModel
from trimtab.serving.protocol import ChatRequest

USER = [{"role": "user", "content": "Tell me of the sea."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"enum": [1, 2, 3]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
STANDARD = inspect.signature(Completions.create).parameters


def chat(client: OpenAI, messages: Any = USER, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name not in STANDARD}
    return client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, **fields)


def ids_of(engine: Engine, messages: Any, **kwargs: Any) -> list[int]:
    text = engine.model.tokenizer.apply_chat_template(messages, **kwargs)
    return engine.model.tokenizer.encode(text, add_special_tokens=False)


def test_texts_are_those_of_the_engine(client: OpenAI, reference: Engine) -> None:
    params = SamplingParams(seed=3, n=2, temperature=0.9, max_tokens=10)
    (wanted,) = reference.generate([ids_of(reference, USER)], params)
    answer = chat(client, seed=3, n=2, temperature=0.9, max_completion_tokens=10)
    assert [choice.message.content for choice in answer.choices] == [out.text for out in wanted.outputs]
    assert [choice.message.role for choice in answer.choices] == ["assistant"] * 2
    assert [choice.finish_reason for choice in answer.choices] == [o.finish_reason for o in wanted.outputs]
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")


def test_developer_is_system_and_parts_are_joined(client: OpenAI, reference: Engine) -> None:
    plain = [{"role": "system", "content": "Be brief.\nBe kind."}, *USER]
    (wanted,) = reference.generate([ids_of(reference, plain)], SamplingParams(temperature=0.0, max_tokens=6))
    parts = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]
    answer = chat(client, [{"role": "developer", "content": parts}, *USER], temperature=0, max_tokens=6)
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)


def test_an_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = chat(client, max_tokens=4)
    again = [*USER, first.choices[0].message.model_dump(), {"role": "user", "content": "Go on."}]
    assert chat(client, again, max_tokens=2).usage.prompt_tokens > first.usage.prompt_tokens


def test_the_last_message_can_be_continued(client: OpenAI, reference: Engine) -> None:
    messages = [*USER, {"role": "assistant", "content": "The sea is"}]
    ids = ids_of(reference, messages, continue_final_message=True)
    (wanted,) = reference.generate([ids], SamplingParams(temperature=0.0, max_tokens=6))
    fields = dict(continue_final_message=True, add_generation_prompt=False)
    answer = chat(client, messages, temperature=0, max_tokens=6, return_token_ids=True, **fields)
    assert answer.prompt_token_ids == ids
    assert answer.choices[0].token_ids == wanted.token_ids


def test_until_the_context_is_full_unless_told(reference: Engine) -> None:
    body = ChatRequest.model_validate({"model": "tiny", "messages": USER})
    call = ChatCall("id", body, ServedModel("tiny", "tiny", reference))
    asyncio.run(call.prepare())
    assert call.params[0].max_tokens is None


def test_logprobs_are_those_of_the_engine(client: OpenAI, reference: Engine) -> None:
    # An end token has a log-probability but is no part of the text: the model is kept from drawing one.
    bias = {str(i): -100.0 for i in reference.model.config.eos_token_ids}
    params = SamplingParams(seed=5, max_tokens=6, logprobs=2, logit_bias={int(i): b for i, b in bias.items()})
    (wanted,) = reference.generate([ids_of(reference, USER)], params)
    choice = chat(client, seed=5, max_tokens=6, logprobs=True, top_logprobs=2, logit_bias=bias).choices[0]
    assert len(choice.logprobs.content) == len(wanted.logprobs)
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == wanted.text
    decode = reference.model.tokenizer.decode
    for told, entry in zip(choice.logprobs.content, wanted.logprobs, strict=True):
        assert (told.token, told.logprob) == (decode([entry.token_id]), entry.logprob)
        top = [(decode([i], skip_special_tokens=False), logprob) for i, logprob in entry.top]
        assert [(one.token, one.logprob) for one in told.top_logprobs] == top
    bare = chat(client, seed=5, max_tokens=6, logprobs=True).choices[0].logprobs.content
    assert [one.top_logprobs for one in bare] == [[]] * len(bare)


def test_harmless_fields_change_nothing(client: OpenAI) -> None:
    fields = dict(temperature=0, max_tokens=6)
    plain = chat(client, **fields).choices[0].message.content
    harmless = dict(user="u1", metadata={"a": "b"}, store=False, service_tier="auto", modalities=["text"])
    harmless |= dict(prompt_cache_key="k", safety_identifier="s", audio=None)
    assert chat(client, **fields, **harmless).choices[0].message.content == plain


def test_json_object_and_schema(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    strict = {"type": "json_schema", "json_schema": {"name": "toy", "schema": schema, "strict": True}}
    for seed in range(3):
        choice = chat(client, seed=seed, max_tokens=60, response_format=strict).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), schema)
    content = chat(client, seed=1, max_tokens=200, response_format={"type": "json_object"}).choices[0]
    assert content.message.content.lstrip().startswith("{")
    if content.finish_reason == "stop":
        assert isinstance(json.loads(content.message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tools_are_called(client: OpenAI, choice: Any) -> None:
    fields = dict(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
    answer = chat(client, seed=2, max_tokens=120, **fields).choices[0]
    call = answer.message.tool_calls[0]
    assert (call.type, call.function.name) == ("function", "weather")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    assert answer.message.content is None
    assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")


def test_a_tools_answer_goes_into_the_prompt(client: OpenAI) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"Rome"}'},
    }
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny in Rome"},
    ]
    answer = chat(client, messages, max_tokens=2, return_token_ids=True)
    plain = chat(client, max_tokens=2)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens + 5
