"""A server that speaks just enough of OpenAI's API, whose every answer is decided by the test."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

Answer = AsyncIterator[bytes] | tuple[int, bytes]
MODELS = {
    "data": [{"id": "fake", "max_model_len": 512, "trimtab": {"plan": "full", "chat": True}}, {"id": "b"}]
}


class FakeServer:
    """Answers POSTs by `answer(path, body)`: (status, body), or an iterator of the chunks of a stream.

    `seen` has (path, body, headers) of all requests, `connections` counts them, `counts` are tokens of texts.
    """

    def __init__(self, answer: Callable[[str, Any], Awaitable[Answer]] | None = None) -> None:
        self._answer = answer or self.complete
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.connections = 0
        self.close_after_each = False

    async def __aenter__(self) -> FakeServer:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def complete(self, path: str, body: Any) -> Answer:
        """As many tokens as asked for, a chunk each, four characters of a prompt to a token."""
        text = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        count = body["max_tokens"]
        usage = {"prompt_tokens": max(1, len(text) // 4), "completion_tokens": count}
        if not body.get("stream"):
            return 200, json.dumps({"choices": [{"text": "x" * count}], "usage": usage}).encode()
        return stream(
            [{"choices": [{"text": "x", "token_ids": [7]}]}] * count + [{"choices": [], "usage": usage}]
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else None
        self.seen.append((path, body, headers))
        if method == "GET":
            answer: Answer = (200, json.dumps(MODELS).encode())
        else:
            answer = await self._answer(path, body)
        if isinstance(answer, tuple):
            status, text = answer
            writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            async for chunk in answer:
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        await writer.drain()
        return not self.close_after_each


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else json.dumps(data).encode()) + b"\n\n"


async def stream(chunks: list[Any], end: bool = True) -> AsyncIterator[bytes]:
    """Server-sent events, and `[DONE]` if it is to end well."""
    for chunk in chunks:
        yield event(chunk)
    if end:
        yield event(b"[DONE]")
