"""An HTTP/1.1 client that only notes when bytes came: it shares the machine with the server it measures.

A request is written in one piece, the answer's body is kept with the time of each arrival, and nothing is
decoded before the measurement is over. Connections are kept alive and there may be any number of them: a
pool with a limit would hold requests back just when the server is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from trimtab.errors import ConfigError

now = time.perf_counter


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer. Times are of `now`; `parts` are (time, bytes) of the body as they came."""

    scheduled: float
    begun: float = 0.0  # when the client got round to it: later than `scheduled` if the client is too slow
    ended: float = 0.0
    status: int = 0
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None

    @property
    def body(self) -> bytes:
        return b"".join(data for _, data in self.parts)


class _Connection(asyncio.Protocol):
    """A connection with at most one request under way."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.done: asyncio.Future[None] | None = None
        self._time = 0.0

    def send(self, request: bytes, exchange: Exchange, done: asyncio.Future[None]) -> None:
        assert self.transport is not None
        self.exchange, self.done = exchange, done
        self._parser = httptools.HttpResponseParser(self)
        self.transport.write(request)

    @property
    def alive(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def _end(self, error: str | None) -> None:
        exchange, done = self.exchange, self.done
        self.exchange = self.done = None
        if exchange is not None and done is not None and not done.done():
            exchange.ended, exchange.error = now(), error
            done.set_result(None)

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        self._time = now()
        if self.exchange is None:
            self.close()  # an answer nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._end("not HTTP")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end("connection lost")

    # --- called by the parser

    def on_headers_complete(self) -> None:
        if self.exchange is not None:
            self.exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.exchange is not None:
            self.exchange.parts.append((self._time, body))

    def on_message_complete(self) -> None:
        keep = self._parser.should_keep_alive()
        self._end(None)
        if not keep:
            self.close()


class Client:
    """Requests to one server. Use it inside a running event loop, and `close` it."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url is {url!r}; write an address such as 'http://127.0.0.1:8000'")
        try:
            port = parts.port
        except ValueError:
            raise ConfigError(f"--url is {url!r}; its port must be a number up to 65535") from None
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.timeout_s = timeout_s
        self._host, self._port = parts.hostname, port or (443 if parts.scheme == "https" else 80)
        self._ssl = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = urlsplit(self.url).path
        lines = [f"Host: {parts.netloc}", "Accept: */*", "User-Agent: trimtab-bench"]
        lines += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._headers = "".join(f"{line}\r\n" for line in lines)
        self._idle: list[_Connection] = []

    def request(self, path: str, body: bytes | None = None) -> bytes:
        """The bytes of a request, made beforehand so that sending is one write."""
        if body is None:
            return f"GET {self._path}{path} HTTP/1.1\r\n{self._headers}\r\n".encode()
        head = f"POST {self._path}{path} HTTP/1.1\r\n{self._headers}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def send(
        self, request: bytes, scheduled: float | None = None, hang_up_after: int | None = None
    ) -> Exchange:
        """Send `request` and wait for the end of its answer; what went wrong is in `error`, never raised.

        `hang_up_after`: close the connection once so many parts of the body have come.
        """
        exchange = Exchange(now() if scheduled is None else scheduled, begun=now())
        left = self.timeout_s - (exchange.begun - exchange.scheduled)
        try:
            async with asyncio.timeout(left):
                await self._send(request, exchange, hang_up_after)
        except TimeoutError:
            exchange.error = f"no end within {self.timeout_s:g} s"
        except OSError as error:
            exchange.error = f"no connection: {error.strerror or error}"
        exchange.ended = exchange.ended or now()
        return exchange

    async def _send(self, request: bytes, exchange: Exchange, hang_up_after: int | None) -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, reused = await self._connection()
            done: asyncio.Future[None] = loop.create_future()
            try:
                connection.send(request, exchange, done)
                if hang_up_after is not None:
                    while not done.done() and len(exchange.parts) < hang_up_after:
                        await asyncio.sleep(0.001)
                    connection.close()
                await done
            except BaseException:
                connection.exchange = None
                connection.close()
                raise
            if exchange.error and reused and not exchange.status:
                exchange.error, exchange.ended = None, 0.0  # the server had closed an idle connection
                continue
            if connection.alive and exchange.error is None:
                self._idle.append(connection)
            return

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.alive:
                return connection, True
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        return made, False

    async def get(self, path: str) -> Exchange:
        return await self.send(self.request(path))

    async def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
