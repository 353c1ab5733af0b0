"""A server that speaks the API's wire format and makes its answers up, so that every test is exact.

What it does is asked for in the prompt: `slow` writes until it is stopped, `fail` answers 400 and `busy` 429,
`break` fails in the middle, `cut` ends without saying so, `say: TEXT` writes that text, anything else is
echoed. A plan with `kivi` in its name holds a quarter of the bytes and writes another ending for `fork`.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from trimtab.serving.playground.page import router

BYTES_PER_TOKEN = 1024


def served(name: str, plan: str, chat: bool = True) -> dict[str, Any]:
    """One entry of /v1/models."""
    cache = plan.removeprefix("cache=")
    about = {"plan": plan, "label": cache, "cache": cache, "chat": chat, "dtype": "bfloat16", "device": "cpu"}
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "trimtab",
        "root": None,
        "max_model_len": 2048,
        "trimtab": about | {"kv_bytes_capacity": 2**28},
    }


FULL, KIVI = served("tiny", "cache=full"), served("tiny:kivi:bits=2", "cache=kivi:bits=2")


class Mock:
    """What the server has been asked, and how many answers were given up by their readers."""

    def __init__(self, models: list[dict[str, Any]], key: str | None = None) -> None:
        self.models, self.key = models, key
        self.bodies: list[dict[str, Any]] = []
        self.disconnected = 0
        self.writing = 0
        self.most_at_once = 0
        self.app = FastAPI()
        self.app.include_router(router)
        self.app.get("/v1/models")(self.list_models)
        self.app.post("/v1/completions")(self.complete)
        self.app.post("/v1/chat/completions")(self.complete)

    def refused(self, request: Request) -> JSONResponse | None:
        """401 where a key is wanted and another, or none, was sent."""
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'")

    async def list_models(self, request: Request) -> Any:
        return self.refused(request) or {"object": "list", "data": self.models}

    async def complete(self, request: Request) -> Any:
        if (refusal := self.refused(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if prompt == "fail":
            return error(400, f"temperature is {body.get('temperature')}; it must be a number, at least 0")
        if prompt == "busy":
            return error(429, "the queue is full", {"Retry-After": "3"})
        return StreamingResponse(self.chunks(body, prompt, request), media_type="text/event-stream")

    async def chunks(self, body: dict[str, Any], prompt: str, request: Request) -> AsyncIterator[bytes]:
        chat, kivi = "messages" in body, "kivi" in body["model"]
        prompt_tokens = len(prompt) // 4 + 10 * len(body.get("messages", ()))
        self.writing += 1
        self.most_at_once = max(self.most_at_once, self.writing)
        try:
            for number, piece in enumerate(pieces(prompt, kivi), start=1):
                if await request.is_disconnected():
                    self.disconnected += 1
                    return
                chunk = self.chunk(body, chat, piece, None, prompt_tokens, number, kivi)
                # Events come in parts, characters too: readers must put them together.
                event = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
                middle = event.find(b'content": "') + len(b'content": "') + 1
                yield event[:middle]
                await asyncio.sleep(0.001)
                yield event[middle:]
                if prompt == "break" and number == 3:
                    failure = {"error": {"message": "the engine failed", "code": 500}}
                    yield f"data: {json.dumps(failure)}\n\n".encode()
                    return
                if prompt == "cut" and number == 3:
                    return
                await asyncio.sleep(0.005 if prompt != "slow" else 0.02)
            last = self.chunk(body, chat, "", "stop", prompt_tokens, number, kivi)
            yield f"data: {json.dumps(last)}\r\n\r\ndata: [DONE]\r\n\r\n".encode()
        except asyncio.CancelledError:
            self.disconnected += 1
            raise
        finally:
            self.writing -= 1

    def chunk(self, body, chat, piece, finish, prompt_tokens, number, kivi) -> dict[str, Any]:
        """The stream's piece `number`, with usage and costs where the request asks for them."""
        choice = {"index": 0, "finish_reason": finish} | (
            {"delta": {"content": piece}} if chat else {"text": piece}
        )
        held = (prompt_tokens + number) * BYTES_PER_TOKEN // (4 if kivi else 1)
        extras = {
            "plan": "cache=kivi:bits=2" if kivi else "cache=full",
            "queue_s": 0.0,
            "ttft_s": 0.02,
            "tokens_per_s": 80.0 if kivi else 100.0,
            "cached_prompt_tokens": min(16, prompt_tokens - 1),
            "kv_bytes_held": held,
            "kv_bytes_peak": held,
            "preemptions": 0,
            "notes": [],
        }
        chunk: dict[str, Any] = {"id": "x", "model": body["model"], "choices": [choice]}
        if (body.get("stream_options") or {}).get("continuous_usage_stats"):
            total = prompt_tokens + number
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": number, "total_tokens": total}
            chunk |= {"usage": usage, "trimtab": extras}
        return chunk


def pieces(prompt: str, kivi: bool) -> Iterator[str]:
    """The words the mock answers with."""
    if prompt == "slow":
        yield from (f"word{i} " for i in range(100_000))
    elif prompt in ("break", "cut"):
        yield from ("one ", "two ", "three ", "four ")
    elif prompt == "fork":
        yield from re.findall(r"\s*\S+", f"The tide came in at {'midnight' if kivi else 'midday'} and rose.")
    else:
        yield from re.findall(r"\s*\S+", prompt.removeprefix("say: ")) or [""]


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """OpenAI's error object."""
    kind = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": kind}, status, headers)


@contextmanager
def running(mock: Mock) -> Iterator[str]:
    """The mock on a free port of this machine; gives its address."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(mock.app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
