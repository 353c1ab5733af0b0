"""`/v1/models`, `/health`, what is not there, and the description of the API."""

from __future__ import annotations

import json

import pytest
from openai import NotFoundError, OpenAI

from serving.server import Server, until
from trimtab import Engine


def test_models_are_listed_with_their_plans(client: OpenAI, server: Server) -> None:
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "tiny:kivi:bits=2"]
    for name, engine in server.engines.items():
        model = models[name]
        assert (model.object, model.owned_by, model.max_model_len) == ("model", "trimtab", 2048)
        facts = model.trimtab
        assert facts["plan"] == str(engine.plan) and facts["cache"] == str(engine.plan.cache)
        assert facts["kv_bytes_capacity"] == engine.cache.bytes_capacity
        assert (facts["chat"], facts["device"], facts["dtype"]) == (True, "cpu", "bfloat16")
        assert client.models.retrieve(name).model_dump() == model.model_dump()


def test_an_unknown_model_is_named_and_another_proposed(client: OpenAI) -> None:
    for ask in (
        lambda: client.models.retrieve("tinny"),
        lambda: client.completions.create(model="tinny", prompt="a"),
        lambda: client.chat.completions.create(model="tinny", messages=[{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(NotFoundError) as refused:
            ask()
        error = refused.value
        assert (error.code, error.param) == ("model_not_found", "model")
        assert "'tinny'" in error.message and "Did you mean 'tiny'" in error.message


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2/x", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)],
)
def test_what_is_not_there(server: Server, method: str, path: str, status: int) -> None:
    found, headers, data = server.call(method, path)
    error = json.loads(data)["error"]
    assert found == status and path in error["message"]
    assert status != 405 or headers["allow"]


def test_health(server: Server, reference: Engine) -> None:
    assert server.call("GET", "/health")[::2] == (200, b'{"status":"ok"}')
    other = Server({"tiny": reference})
    try:
        other.worker.drain()
        assert other.call("GET", "/health")[0] == 503
        status, error = other.error("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert (status, error["code"]) == (503, "not_ready")
    finally:
        other.stop()


def test_a_full_queue_says_when_to_come_back(reference: Engine) -> None:
    server = Server({"tiny": reference}, max_waiting=2)
    try:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 1000, "ignore_eos": True, "n": 40}
        sock = server.open_stream("/v1/completions", body)
        status, headers, data = server.call("POST", "/v1/completions", {"model": "tiny", "prompt": "a"})
        assert status == 429 and int(headers["retry-after"]) >= 1
        error = json.loads(data)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        sock.close()
        server.check_idle()
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 200
    finally:
        server.stop()


def test_the_api_describes_what_it_takes(server: Server) -> None:
    description = json.loads(server.call("GET", "/openapi.json")[2])
    schemas = description["components"]["schemas"]
    assert {"prompt", "echo", "structured_outputs"} <= schemas["CompletionRequest"]["properties"].keys()
    assert {"messages", "tools", "response_format"} <= schemas["ChatRequest"]["properties"].keys()
    assert schemas["ChatRequest"]["additionalProperties"] is False
    text = json.dumps(description)
    for reference in set(part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]):
        assert reference in schemas


def test_observers_are_told_once_of_every_request(server: Server) -> None:
    prompt = "told " * 40
    body = {"model": "tiny", "prompt": [prompt, "b"], "max_tokens": 5, "n": 2, "ignore_eos": True}
    server.post("/v1/completions", body)
    server.events("/v1/completions", body)
    server.post("/v1/completions", {**body, "n": -1})
    server.post("/v1/chat/completions", {"model": "no", "messages": [{"role": "user", "content": "c"}]})
    until(lambda: len(server.records) == 4, "four records")
    for record, streamed in zip(server.records[:2], (False, True), strict=True):
        assert (record.status, record.stream, record.error) == (200, streamed, None)
        assert (record.route, record.model, record.client) == ("/v1/completions", "tiny", "127.0.0.1")
        assert record.completion_tokens == 20 and record.prompt_tokens > 40
        assert record.finish_reasons == ["length"] * 4
        assert len(record.inter_token_s) == 16 and min(record.inter_token_s) >= 0
        assert 0 < record.queue_s <= record.ttft_s <= record.total_s
        assert record.prompt == f"{prompt}\nb"
        assert record.id.startswith("cmpl-")
    assert server.records[1].cached_tokens >= 16
    refused, unknown = server.records[2:]
    assert (refused.status, refused.completion_tokens, refused.ttft_s) == (400, 0, None)
    assert "n is -1" in refused.error
    assert (unknown.status, unknown.model, unknown.route) == (404, "no", "/v1/chat/completions")


def test_an_observer_that_fails_disturbs_nobody(server: Server) -> None:
    def fail(record: object) -> None:
        raise ZeroDivisionError

    server.app.state.observers.insert(0, fail)
    try:
        assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"})[0] == 200
    finally:
        server.app.state.observers.remove(fail)
    until(lambda: server.records, "the record")
