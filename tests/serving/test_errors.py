"""Every mistake has its status, one sentence and the field's name; nobody else is disturbed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from serving.server import Server
from serving.test_chat import USER, WEATHER
from trimtab import Engine

TEXT = {"model": "tiny", "prompt": "The sea", "max_tokens": 3}
CHAT = {"model": "tiny", "messages": USER, "max_tokens": 3}
NAN = float("nan")


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


COMMON: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temperature": -1}, "temperature", "temperature is -1; it must be at least 0"),
    ({"temperature": NAN}, "temperature", "finite"),
    ({"temperature": float("inf")}, "temperature", "finite"),
    ({"temperature": "1"}, "temperature", "a number"),
    ({"top_p": NAN}, "top_p", "finite"),
    ({"top_p": 0}, "top_p", "above 0"),
    ({"top_p": 1.5}, "top_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"min_p": -0.1}, "min_p", "at least 0"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": -1}, "n", "at least 1"),
    ({"n": True}, "n", "n is true; it must be a whole number"),
    ({"n": 1.5}, "n", "a whole number"),
    ({"n": 65}, "n", "65 texts"),
    ({"n": 3, "best_of": 2}, "best_of", "at least n"),
    ({"best_of": 2, "stream": True}, "best_of", "stream"),
    ({"max_tokens": -5}, "max_tokens", "at least 0"),
    ({"max_tokens": 0}, "max_tokens", "at least one token"),
    ({"min_tokens": 4}, "min_tokens", "max_tokens is 3"),
    ({"presence_penalty": NAN}, "presence_penalty", "finite"),
    ({"frequency_penalty": 2.5}, "frequency_penalty", "at most 2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
    ({"logit_bias": {"5": NAN}}, "logit_bias.5", "finite"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "match"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "0 to 4095"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": [1]}, "stop", "list of texts"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stop": "a" * 2000}, "stop", "1024"),
    ({"stop_token_ids": [4096]}, "stop_token_ids", "0 to 4095"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "at least 0"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "does not know|knows"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", "at most 20"),
    ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
    ({"guided_json": {}}, "guided_json", "structured_outputs"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "json_schema"),
    (schema({"type": "objekt"}), None, "objekt"),
    (schema({"type": "object", "x": NAN}), "response_format.json_schema.schema", "finite"),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "leave it out"),
    ({"structured_outputs": {"regex": "("}}, None, "("),
    ({"structured_outputs": {"grammar": "nonsense"}}, None, "grammar"),
    ({"structured_outputs": {"regex": "a"}, "stop": "b"}, "stop", "structured_outputs"),
    (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "both",
    ),
]
TEXT_ONLY: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [[]]}, "prompt", "empty"),
    ({"prompt": ["a", ""]}, "prompt", "number 2 of 2"),
    ({"prompt": None}, "prompt", "a text"),
    ({"prompt": [1, "a"]}, "prompt", "all of one kind"),
    ({"prompt": [1, True]}, "prompt", "all of one kind"),
    ({"prompt": [4096]}, "prompt", "0 to 4095"),
    ({"prompt": [-1]}, "prompt", "0 to 4095"),
    ({"prompt": ["a"] * 65}, "prompt", "65 texts"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "a whole number"),
    ({"messages": USER}, "messages", "leave it out"),
    ({"model": None}, "model", "a text"),
]
CHAT_ONLY: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hello"}, "messages", "a list"),
    ({"messages": [{"role": "bot", "content": "a"}]}, "messages[0].role", "'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages[0]", "no content"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "tool_call_id"),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "messages[0].x", "leave it out"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        "messages[0].content",
        "text only",
    ),
    ({"modalities": ["audio"]}, "modalities[0]", "'text'"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"store": True}, "store", "false"),
    ({"service_tier": "flex"}, "service_tier", "auto"),
    ({"functions": [{}]}, "functions", "tools"),
    ({"reasoning_effort": "low"}, "reasoning_effort", "chat_template_kwargs"),
    ({"max_completion_tokens": 4}, "max_completion_tokens", "mean the same"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": 2}, "logprobs", "true or false"),
    ({"tool_choice": "required"}, "tool_choice", "tools"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice", "'required'"),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, "tools", "combined"),
    ({"tools": [WEATHER], "stop": "x"}, "stop", "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1]", "weather"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "only one"),
]


@pytest.mark.parametrize(("fields", "param", "words"), COMMON)
def test_mistakes_of_both_routes(server: Server, fields: Any, param: str | None, words: str) -> None:
    for path, body in (("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)):
        check(server, path, body | fields, param, words)


@pytest.mark.parametrize(("fields", "param", "words"), TEXT_ONLY)
def test_mistakes_of_completions(server: Server, fields: Any, param: str | None, words: str) -> None:
    check(server, "/v1/completions", TEXT | fields, param, words)


@pytest.mark.parametrize(("fields", "param", "words"), CHAT_ONLY)
def test_mistakes_of_chats(server: Server, fields: Any, param: str | None, words: str) -> None:
    check(server, "/v1/chat/completions", CHAT | fields, param, words)


def check(server: Server, path: str, body: dict[str, Any], param: str | None, words: str) -> None:
    status, error = server.error(path, body)
    assert (status, error["type"]) == (400, "invalid_request_error"), error
    assert any(word in error["message"] for word in words.split("|")), error
    assert param is None or error["param"] == param, error
    assert "\n" not in error["message"].strip() and len(error["message"]) < 600
    assert server.records[-1].status == 400 and server.records[-1].error == error["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model": "tiny", "prompt": "a",}', "trailing comma"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"model": "tiny", "prompt": "\xff"}', "not valid JSON"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "not valid JSON"),
        (b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 5000, "not valid JSON"),
        (b'{"model": "tiny"}', "prompt is missing"),
        (b'{"prompt": "a"}', "model is missing"),
    ],
)
def test_bodies_that_are_no_request(server: Server, body: bytes, words: str) -> None:
    status, error = server.error("/v1/completions", body)
    assert status == 400 and words in error["message"]


@pytest.mark.parametrize("type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bodies_must_say_that_they_are_json(server: Server, type: str) -> None:
    status, error = server.error("/v1/completions", TEXT, **{"Content-Type": type})
    assert status == 415 and "Content-Type: application/json" in error["message"]


def test_huge_values_that_are_allowed(server: Server) -> None:
    body = TEXT | {"seed": 10**300, "top_k": 10**18, "temperature": 1e30}
    assert server.post("/v1/completions", body)[0] == 200
    assert server.post("/v1/completions", TEXT | {"seed": -(10**30), "stop": None, "n": None})[0] == 200


def test_a_context_that_is_too_short_names_both_lengths(client: OpenAI) -> None:
    many = [5] * 2000
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=many, max_tokens=60)
    error = refused.value
    assert (error.code, error.param) == ("context_length_exceeded", "prompt")
    assert all(number in error.message for number in ("2000", "60", "2060", "2048", "48"))
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="tiny", prompt=[[5], [5] * 2048])
    assert "number 2 of 2" in refused.value.message and "2048" in refused.value.message
    long = [{"role": "user", "content": "sea " * 3000}]
    with pytest.raises(BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=long)
    error = refused.value
    assert (error.code, error.param) == ("context_length_exceeded", "messages")
    tokens = int(error.message.split(" tokens")[0].split()[-1])
    assert tokens > 3000 and "2048" in error.message


def test_too_little_memory_for_one_request(reference: Engine) -> None:
    small = Engine(reference.model, kv_memory="200KiB", threads=1)
    server = Server({"tiny": small})
    try:
        body = {"model": "tiny", "prompt": [5] * 600, "max_tokens": 2}
        status, error = server.error("/v1/completions", body)
        assert status == 400 and "kv_memory" in error["message"] and error["param"] is None
        (event,) = server.events("/v1/completions", body)
        assert event["error"]["message"] == error["message"]
        assert server.post("/v1/completions", {**body, "prompt": [5] * 20})[0] == 200
        server.check_idle()
    finally:
        server.stop()


def test_a_bug_is_a_500_without_details(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("trimtab.serving.prompts.encode", fail)
    status, error = server.error("/v1/completions", TEXT)
    assert (status, error["type"]) == (500, "server_error")
    assert "secret" not in error["message"]


def test_good_requests_are_not_disturbed_by_bad_ones(server: Server) -> None:
    body = {"model": "tiny", "prompt": "The sea", "max_tokens": 120, "seed": 5, "ignore_eos": True}
    _, alone = server.post("/v1/completions", body)
    streamed: list[Any] = []
    thread = threading.Thread(target=lambda: streamed.extend(server.events("/v1/completions", body)))
    thread.start()
    while True:
        for fields in ({"temperature": NAN}, {"prompt": [4096]}, {"prompt": [5] * 4000}, {"n": 0}):
            assert server.post("/v1/completions", TEXT | fields)[0] == 400
        if not thread.is_alive():
            break
    assert streamed.pop() == "[DONE]"
    text = "".join(chunk["choices"][0]["text"] for chunk in streamed)
    assert text == alone["choices"][0]["text"]


def test_stream_requests_are_refused_like_others(server: Server) -> None:
    status, error = server.error("/v1/chat/completions", CHAT | {"stream": True, "n": 0})
    assert status == 400 and error["param"] == "n"
