"""Streams: joined they are the whole answer, and a client that goes leaves nothing behind."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import pytest
from openai import APIError, OpenAI

from serving.server import Server, events, until
from serving.test_chat import USER, WEATHER
from trimtab import Engine
from trimtab.serving.sse import EventStream

CHAT = {"model": "tiny", "messages": USER, "max_tokens": 12, "seed": 1}
TEXT = {"model": "tiny", "prompt": "The sea was", "max_tokens": 12, "seed": 1}


def join(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    """Choices by index, as a client puts them together."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        whole = found.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": []})
        assert whole["finish_reason"] is None, "a choice went on after its end"
        delta = choice.get("delta", {})
        whole["text"] += choice.get("text", "") + delta.get("content", "")
        for call in delta.get("tool_calls", ()):
            calls = whole.setdefault("calls", {})
            one = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            one["name"] += call["function"].get("name", "")
            one["arguments"] += call["function"]["arguments"]
        if choice["logprobs"]:
            part = choice["logprobs"]
            whole["logprobs"] += part["content"] if "content" in part else _rows(part)
        whole["finish_reason"] = choice["finish_reason"]
    return found


def _rows(part: dict[str, Any]) -> list[Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return [list(row) for row in zip(*(part[name] for name in names), strict=True)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3},
        {"stop": ["a"], "max_tokens": 40},
        {"logprobs": 2, "n": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"prompt": ["The sea was", "A red"], "n": 2},
        {"structured_outputs": {"regex": "[a-z]{9}"}, "max_tokens": 30},
    ],
)
def test_a_streamed_completion_is_the_whole_one(server: Server, fields: dict[str, Any]) -> None:
    body = TEXT | fields
    _, whole = server.post("/v1/completions", body)
    chunks = server.events("/v1/completions", body)
    assert chunks.pop() == "[DONE]"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    joined = join(chunks)
    assert len(joined) == len(whole["choices"])
    for choice in whole["choices"]:
        streamed = joined[choice["index"]]
        assert streamed["text"] == choice["text"]
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert streamed["logprobs"] == (_rows(choice["logprobs"]) if choice["logprobs"] else [])


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 2, "max_completion_tokens": 12},
        {"logprobs": True, "top_logprobs": 2},
        {"response_format": {"type": "json_object"}, "max_tokens": 30},
        {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 120},
        {"tools": [WEATHER]},
    ],
)
def test_a_streamed_chat_is_the_whole_one(server: Server, fields: dict[str, Any]) -> None:
    body = CHAT | fields
    _, whole = server.post("/v1/chat/completions", body)
    chunks = server.events("/v1/chat/completions", body)
    assert chunks.pop() == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first = {chunk["choices"][0]["index"]: chunk for chunk in reversed(chunks)}
    assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in first.values())
    joined = join(chunks)
    for choice in whole["choices"]:
        streamed, message = joined[choice["index"]], choice["message"]
        assert streamed["text"] == (message["content"] or "")
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert streamed["logprobs"] == (choice["logprobs"]["content"] if choice["logprobs"] else [])
        calls = [call["function"] for call in message.get("tool_calls", ())]
        assert list(streamed.get("calls", {}).values()) == calls


def test_the_official_client_reads_streams(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT)
    fields = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.create(**fields) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens > 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_where_usage_and_costs_are_told(server: Server) -> None:
    plain = server.events("/v1/chat/completions", CHAT | {"n": 2})[:-1]
    assert not any("usage" in chunk for chunk in plain)
    assert [i for i, chunk in enumerate(plain) if "trimtab" in chunk] == [len(plain) - 1]
    with_usage = server.events("/v1/chat/completions", CHAT | {"stream_options": {"include_usage": True}})
    last = with_usage[-2]
    assert last["choices"] == []
    assert last["usage"] == server.post("/v1/chat/completions", CHAT)[1]["usage"]
    assert last["trimtab"].keys() == plain[-1]["trimtab"].keys()
    assert [chunk["usage"] for chunk in with_usage[:-2]] == [None] * (len(with_usage) - 2)
    assert not any("trimtab" in chunk for chunk in with_usage[:-2])
    options = {"stream_options": {"continuous_usage_stats": True}}
    live = server.events("/v1/completions", TEXT | options)[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in live]
    assert counts == sorted(counts) and counts[0] >= 1
    assert all(chunk["trimtab"]["kv_bytes_held"] > 0 for chunk in live)
    _, whole = server.post("/v1/completions", TEXT)
    assert whole["trimtab"].keys() == live[-1]["trimtab"].keys()
    assert counts[-1] == whole["usage"]["completion_tokens"]


def test_token_ids_of_a_stream(server: Server) -> None:
    body = TEXT | {"return_token_ids": True}
    _, whole = server.post("/v1/completions", body)
    choices = [c["choices"][0] for c in server.events("/v1/completions", body)[:-1]]
    assert choices[0]["prompt_token_ids"] == whole["choices"][0]["prompt_token_ids"]
    streamed = [i for choice in choices for i in choice.get("token_ids", [])]
    assert streamed == whole["choices"][0]["token_ids"]
    chunks = server.events("/v1/chat/completions", CHAT | {"return_token_ids": True})[:-1]
    assert chunks[0]["prompt_token_ids"]
    _, whole = server.post("/v1/chat/completions", CHAT)
    count = sum(len(chunk["choices"][0].get("token_ids", [])) for chunk in chunks)
    assert count == whole["usage"]["completion_tokens"]


LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_leaves_nothing(server: Server, reset: bool) -> None:
    sock = server.open_stream("/v1/completions", TEXT | LONG)
    if reset:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
    server.check_idle()
    until(lambda: server.records, "the record")
    (record,) = server.records
    assert (record.status, record.stream, record.error) == (499, True, None)
    assert record.completion_tokens < 1500 and record.finish_reasons == ["cancelled"]


def test_a_client_that_does_not_stream_goes_too(server: Server) -> None:
    sock = socket.create_connection(("127.0.0.1", server.port))
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 1500, "ignore_eos": true, "n": 4}'
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    until(lambda: server.engines["tiny"].scheduler.has_work, "the request to run")
    sock.close()
    server.check_idle()
    until(lambda: server.records, "the record")
    assert (server.records[0].status, server.records[0].stream) == (499, False)


def test_many_clients_go_and_others_stay(server: Server) -> None:
    _, alone = server.post("/v1/completions", TEXT | {"max_tokens": 40})
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(server.post("/v1/completions", TEXT | {"max_tokens": 40}))
        )
        for _ in range(3)
    ]
    socks = [server.open_stream("/v1/chat/completions", CHAT | LONG | {"n": 2}) for _ in range(12)]
    for thread in threads:
        thread.start()
    for sock in socks:
        sock.close()
    for thread in threads:
        thread.join()
    assert [answer["choices"][0]["text"] for _, answer in found] == [alone["choices"][0]["text"]] * 3
    server.check_idle()


@pytest.fixture
def impatient(reference: Engine) -> Any:
    server = Server({"tiny": reference}, stream_interval=0.0, request_timeout=0.3)
    yield server
    server.check_idle()
    server.stop()


def test_a_request_that_takes_too_long(impatient: Server) -> None:
    status, error = impatient.error("/v1/completions", TEXT | LONG | {"n": 8})
    assert (status, error["type"]) == (504, "timeout_error")
    assert "0.3 s" in error["message"]
    impatient.check_idle()
    chunks = impatient.events("/v1/completions", TEXT | LONG | {"n": 8})
    assert chunks[-1]["error"]["type"] == "timeout_error"
    assert all(choice["finish_reason"] is None for chunk in chunks[:-1] for choice in chunk["choices"])
    assert impatient.records[0].status == 504
    assert "0.3 s" in (impatient.records[1].error or "")
    with impatient.openai() as client, pytest.raises(APIError, match=r"0\.3 s"):
        list(client.completions.create(**TEXT, stream=True, extra_body={**LONG, "n": 8}))


def test_a_stream_that_fails_on_the_way(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.engines["tiny:kivi:bits=2"]
    body = TEXT | LONG | {"model": "tiny:kivi:bits=2"}
    sock = server.open_stream("/v1/completions", body)

    def fail(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", fail)
        received = b""
        while piece := sock.recv(65536):
            received += piece
            if b'"error"' in received:
                break
    sock.close()
    assert b'"type":"server_error"' in received and b"a bug" not in received
    server.check_idle()
    status, answer = server.post("/v1/completions", TEXT | {"model": "tiny:kivi:bits=2"})
    assert status == 200 and answer["choices"][0]["text"]


def test_comments_keep_a_waiting_stream_alive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EventStream, "keep_alive_s", 0.05)
    gate = threading.Event()
    engine = server.engines["tiny"]
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda meanwhile: (meanwhile(), gate.wait(), step(meanwhile))[2])
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    body = b'{"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": true, "ignore_eos": true}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    received = b""
    while received.count(b": keep-alive\n\n") < 2:
        received += sock.recv(4096)
    gate.set()
    while piece := sock.recv(4096):
        received += piece
    sock.close()
    assert b"data: [DONE]" in received


def test_events_are_read_as_they_are_written() -> None:
    assert list(events(': keep-alive\n\ndata: {"a":1}\n\ndata: [DONE]\n\n')) == [{"a": 1}, "[DONE]"]
