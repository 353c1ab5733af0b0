"""Models without a tokenizer, models whose numbers break, and caches that go on beyond the context."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import trimtab
from engine.fakes import CONTEXT, FakeRunner, continuation, fake_engine, prompt, tiny_model
from serving.server import Server


@pytest.fixture
def bare() -> Iterator[tuple[Server, FakeRunner]]:
    engine, runner = fake_engine()
    endless = trimtab.Engine(tiny_model(), cache="streaming:window=32", kv_memory="1MiB", backend="torch")
    server = Server({"tiny": engine, "endless": endless}, stream_interval=0.0)
    yield server, runner
    server.check_idle()
    server.stop()


def test_ids_in_and_ids_out(bare: tuple[Server, FakeRunner]) -> None:
    server, _ = bare
    ids = prompt(9, 1)
    body = {"model": "tiny", "prompt": ids, "max_tokens": 5, "temperature": 0, "return_token_ids": True}
    status, answer = server.post("/v1/completions", body | {"logprobs": 1, "echo": True})
    assert status == 200
    (choice,) = answer["choices"]
    wanted = continuation(ids, 5)
    assert (choice["token_ids"], choice["prompt_token_ids"], choice["text"]) == (wanted, ids, "")
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in ids + wanted]
    chunks = server.events("/v1/completions", body)[:-1]
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == wanted


def test_what_needs_a_tokenizer_is_refused(bare: tuple[Server, FakeRunner]) -> None:
    server, _ = bare
    status, error = server.error("/v1/completions", {"model": "tiny", "prompt": "text"})
    assert status == 400 and "token ids" in error["message"] and error["param"] == "prompt"
    status, error = server.error("/v1/completions", {"model": "tiny", "prompt": [5], "stop": "x"})
    assert status == 400 and "stop_token_ids" in error["message"]
    messages = [{"role": "user", "content": "a"}]
    status, error = server.error("/v1/chat/completions", {"model": "tiny", "messages": messages})
    assert status == 400 and "/v1/completions" in error["message"]
    status, error = server.error(
        "/v1/completions", {"model": "tiny", "prompt": [5], "structured_outputs": {"regex": "a"}}
    )
    assert status == 400 and "tokenizer" in error["message"]


def test_numbers_that_break_fail_one_request_alone(bare: tuple[Server, FakeRunner]) -> None:
    server, runner = bare
    ids = prompt(7, 2)
    body = {"model": "tiny", "prompt": ids, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    runner.fail_on = ids + continuation(ids, 3)
    status, error = server.error("/v1/completions", body)
    assert (status, error["type"]) == (500, "server_error") and "nan" in error["message"].lower()
    chunks = server.events("/v1/completions", body)
    assert chunks[-1]["error"]["message"] == error["message"]
    told = [i for c in chunks[:-1] for i in c["choices"][0].get("token_ids", [])]
    assert told == continuation(ids, 3)[: len(told)]
    other = prompt(7, 3)
    _, answer = server.post("/v1/completions", body | {"prompt": other})
    assert answer["choices"][0]["token_ids"] == continuation(other, 8)


def test_an_endless_cache_goes_beyond_the_context(bare: tuple[Server, FakeRunner]) -> None:
    server, _ = bare
    long = prompt(CONTEXT + 40, 4)
    body = {"model": "endless", "prompt": long, "ignore_eos": True}
    status, answer = server.post("/v1/completions", body)
    assert status == 200 and answer["usage"] == answer["usage"] | {
        "prompt_tokens": CONTEXT + 40,
        "completion_tokens": 16,
    }
    status, error = server.error("/v1/completions", body | {"model": "tiny"})
    assert (status, error["code"]) == (400, "context_length_exceeded")
