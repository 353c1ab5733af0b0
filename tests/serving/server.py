"""A real server on a free port in a thread, for tests: sockets, uvicorn, the application, a worker."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from openai import OpenAI

from trimtab import Engine
from trimtab.serving.app import create_app
from trimtab.serving.observe import RequestRecord
from trimtab.serving.settings import ServerSettings
from trimtab.serving.worker import Worker

DEADLINE_S = 30.0


def until(condition: Callable[[], Any], what: str = "it") -> None:
    """Wait for a condition; a test that waits in vain fails."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


class Server:
    """Serves engines until `stop`. `records` is what observers were told, oldest first."""

    def __init__(self, engines: dict[str, Engine], *, max_waiting: int = 256, **settings: Any) -> None:
        self.engines = engines
        self.worker = Worker(engines, max_waiting=max_waiting)
        self.app = create_app(self.worker, ServerSettings(**settings))
        self.records: list[RequestRecord] = []
        self.app.state.observers.append(self.records.append)
        self._sock = socket.socket()
        self._sock.bind(("127.0.0.1", 0))
        self._sock.listen(128)
        self.port = self._sock.getsockname()[1]
        config = uvicorn.Config(self.app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]})
        self.worker.start()
        self._thread.start()
        until(lambda: self._server.started, "the server to start")

    def stop(self) -> None:
        self.worker.stop()
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        self._sock.close()

    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=60)

    @property
    def idle(self) -> bool:
        """Nothing runs and nothing is held."""
        engines = self.engines.values()
        return not any(e.scheduler.has_work or e.stats().kv_bytes_held for e in engines)

    def check_idle(self) -> None:
        until(lambda: self.idle, "the engines to be idle")
        for engine in self.engines.values():
            engine.cache.check()

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request over a connection of its own; `body` is bytes, or written as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            sent = (
                {"Content-Type": "application/json"} | (headers or {}) if data is not None else headers or {}
            )
            connection.request(method, path, data, sent)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        status, _, data = self.call("POST", path, body, headers)
        return status, json.loads(data)

    def error(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        """Status and error object of a POST that is refused."""
        status, answer = self.post(path, body, **headers)
        assert answer.keys() == {"error"} and answer["error"].keys() == {"message", "type", "param", "code"}
        return status, answer["error"]

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """What a stream sends: objects, and the word [DONE] as it is."""
        status, headers, data = self.call("POST", path, {**body, "stream": True})
        assert status == 200 and headers["content-type"].startswith("text/event-stream"), data
        return list(events(data.decode()))

    def open_stream(self, path: str, body: dict[str, Any]) -> socket.socket:
        """A connection on which a stream has begun, to be read or broken off by the caller."""
        data = json.dumps({**body, "stream": True}).encode()
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        received = b""
        while b"data: " not in received:
            piece = sock.recv(65536)
            assert piece, received
            received += piece
        return sock


def events(text: str) -> Iterator[Any]:
    """The events of a stream's text, comments left out."""
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)
        else:
            assert not block or block.startswith(":"), block
